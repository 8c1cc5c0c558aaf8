"""Noise schedules, prediction targets and loss weights; no models."""
