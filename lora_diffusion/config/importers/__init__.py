"""Configs and settings of other programs."""
