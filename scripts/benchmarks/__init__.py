"""What the program costs: time, memory, whole commands. `python -m scripts.benchmarks --help` lists them."""
