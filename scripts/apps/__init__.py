"""Compares what `verify` says of adapter files with what the programs themselves do."""
