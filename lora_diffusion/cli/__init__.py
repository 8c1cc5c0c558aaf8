"""The command line: parses, calls a workflow, prints. No logic."""
