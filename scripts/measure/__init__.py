"""What adapters learn. `python -m scripts.measure --help` lists the measurements."""
