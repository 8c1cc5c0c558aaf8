"""Ways to make one adapter of several, one object METHOD in each file."""
