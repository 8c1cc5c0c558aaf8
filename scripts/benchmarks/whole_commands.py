"""Measures the CPU seconds (user + system) of a whole command, of several installations in turns.

    python -m scripts.benchmarks commands --program old/bin/lora-diffusion --program new/bin/lora-diffusion \
        -- train model.path=builtin:emoji data.path=photos train.max_steps=20 'output.path={new}/run' 'cache.path={new}'

`{new}` stands for a folder that is empty at each run, `{kept}` for one that each program keeps from run to run, so that
a warm cache is measured too. The programs run in turns, so that other work on the machine hits all alike; a first round
is not counted. Printed are the least and the median of each, and their ratio to those of the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.processes import run_command


def measure(programs: Sequence[str], arguments: Sequence[str], rounds: int) -> list[list[float]]:
    """Returns the seconds of each program, in the order of the rounds."""
    seconds: list[list[float]] = [[] for _ in programs]
    with tempfile.TemporaryDirectory() as root:
        for turn in range(rounds + 1):
            for index, program in enumerate(programs):
                kept = Path(root) / f"kept{index}"
                kept.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=root) as new:
                    filled = [text.replace("{new}", new).replace("{kept}", str(kept)) for text in arguments]
                    spent = run_command([program, *filled]).cpu_s
                if turn:
                    seconds[index].append(spent)
                print(f"{'round ' + str(turn) if turn else 'warm-up'}  {spent:6.2f} s  {program}", flush=True)
    return seconds


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    seconds = measure(arguments.program, arguments.arguments, arguments.rounds)
    for program, times in zip(arguments.program, seconds, strict=True):
        least, middle = min(times), statistics.median(times)
        ratios = f"{least / min(seconds[0]):.2f} and {middle / statistics.median(seconds[0]):.2f}"
        print(f"{program}: least {least:.2f} s, median {middle:.2f} s; to the first {ratios}")


def add_parser(commands: Any) -> None:
    """Adds the command `commands`."""
    parser = commands.add_parser("commands", help="CPU seconds of a whole command, of several installations in turns")
    parser.add_argument("--program", action="append", required=True, help="a lora-diffusion to run; give several")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("arguments", nargs="+", help="behind --: what each program is called with")
    parser.set_defaults(run=run)
