"""Rebuilds the built-in models and the sample sets; see README.md."""
