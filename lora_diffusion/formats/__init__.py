"""Formats of adapter files, one object FORMAT in each file; find them with `core.registry`."""
