"""The published bases, one description each: names, sizes and prefixes; no weights."""
