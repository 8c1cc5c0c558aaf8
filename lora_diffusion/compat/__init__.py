"""What other programs do with an adapter file: their rules as data, checks, simulation."""
