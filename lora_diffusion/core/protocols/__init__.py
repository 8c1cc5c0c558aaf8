"""The contracts: what a family, a format, a metric and a tracker must offer."""
