"""Records what the program does on fixed inputs: `python -m tests.behaviour.record OUT_FOLDER [--part PART]`.

Record with the code before a change and with the code after it, on the same machine, then compare with
`python -m tests.behaviour.compare BEFORE AFTER`. Only the command line and the tests' small bases are used, so that the
same recorder runs on both. What is left out stands in `tests.behaviour.outcome`. Each part has a process of its own, on
one core, so that there is no number of threads to choose by measuring.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("losses", "conversions", "commands")
_SETTINGS = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1"}


def main() -> None:
    """Writes PART.json for each part into the folder."""
    parser = argparse.ArgumentParser(description="Record what the program does on fixed inputs.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be given several times; default: all")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for part in given.part or PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as work, (given.folder / f"{part}.json").open("w") as file:
            environment = {**os.environ, **_SETTINGS, "PYTHONPATH": str(ROOT), "LORA_DIFFUSION_CACHE": "cache"}
            command = [sys.executable, "-m", "tests.behaviour.parts", part]
            subprocess.run(command, cwd=work, env=environment, stdout=file, check=True)
        print(f"{part}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
