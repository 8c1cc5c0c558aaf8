"""Rebuilds builtin/digits-whisper and datasets/spoken-digits."""
