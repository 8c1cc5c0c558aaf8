"""Scores of pictures, one object METRIC in each file."""
