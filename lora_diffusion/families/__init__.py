"""Families of bases, one object FAMILY in each file."""
