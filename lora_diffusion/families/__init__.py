"""Kinds of base models, one object FAMILY in each file."""
