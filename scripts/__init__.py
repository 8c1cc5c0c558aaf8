"""What is run by hand: benchmarks, measurements, comparisons with apps, and the making of the built-in bases."""
