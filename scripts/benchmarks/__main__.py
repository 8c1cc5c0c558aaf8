"""Measures what the program costs.

    python -m scripts.benchmarks train
    python -m scripts.benchmarks files --json

Each command has a file of its own here, whose first lines say what is compared with what.
"""

from __future__ import annotations

import argparse

from scripts.benchmarks import (
    adapter_files,
    checkpoints,
    memory,
    scoring,
    text_output,
    training_step,
    whole_commands,
)


def main() -> None:
    """Runs the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for benchmark in (training_step, scoring, adapter_files, checkpoints, memory, text_output, whole_commands):
        benchmark.add_parser(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
