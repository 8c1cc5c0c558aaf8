"""What an adapter does to a weight: formulas and sums over factors, no files."""
