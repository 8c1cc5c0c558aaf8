"""Measures the CPU seconds (user + system) of a whole command, of several installations in turns.

    python scripts/cpu_seconds.py --program old/.venv/bin/lora-diffusion --program new/.venv/bin/lora-diffusion \
        -- train model.path=builtin:emoji data.path=photos train.max_steps=20 'output.path={new}/run' 'cache.path={new}'

`{new}` stands for a folder that is empty at each run, `{kept}` for one that each program keeps from run to run, so that
a warm cache is measured too. The programs run in turns, so that other work on the machine hits all alike; a first round
is not counted. Printed are the least and the median of each, and their ratio to those of the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def cpu_seconds(command: Sequence[str]) -> float:
    """Returns the user and system seconds of a command and of all that it started and waited for.

    Raises:
        SystemExit: it failed; what it said is printed.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{said.read().decode(errors='replace')}")
    return usage.ru_utime + usage.ru_stime


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
                    spent = cpu_seconds([program, *filled])
                if turn:
                    seconds[index].append(spent)
                print(f"{'round ' + str(turn) if turn else 'warm-up'}  {spent:6.2f} s  {program}", flush=True)
    return seconds


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", action="append", required=True, help="a lora-diffusion to run; give several")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("arguments", nargs="+", help="behind --: what each program is called with")
    args = parser.parse_args()
    found = measure(args.program, args.arguments, args.rounds)
    for program, own in zip(args.program, found, strict=True):
        least, middle = min(own), statistics.median(own)
        ratios = f"{least / min(found[0]):.2f} and {middle / statistics.median(found[0]):.2f}"
        print(f"{program}: least {least:.2f} s, median {middle:.2f} s; to the first {ratios}")


if __name__ == "__main__":
    main()
