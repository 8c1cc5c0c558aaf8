"""Models that score images and texts, and the metrics."""
