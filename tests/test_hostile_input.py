"""Damaged input of every sort gives a result or one clean message: no traceback, no hang, little memory.

What is damaged is decided by the number of the mutation: `python -m tests.hostile SORT --first NUMBER --number 1` makes
one again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import MEMORY_BYTES, SORTS, TIMEOUT_S

ROOT = Path(__file__).resolve().parents[1]
USUAL = 300
MANY = int(os.environ.get("HOSTILE_MUTATIONS", "20000"))


def _outcome(sort: str, first: int, number: int) -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile", sort, "--first", str(first), "--number", str(number)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120 + number,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    outcome: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return outcome


def _check(outcome: dict[str, Any], number: int) -> None:
    told = outcome["failures"]
    assert not told, f"{len(told)} of {number} failed:\n" + "\n".join(told[:5])
    assert outcome["num_read"] + outcome["num_refused"] == number
    assert outcome["peak_bytes"] < MEMORY_BYTES
    assert outcome["longest_s"] < TIMEOUT_S


@pytest.mark.parametrize("sort", SORTS)
def test_hostile_input(sort: str) -> None:
    outcome = _outcome(sort, 0, USUAL)
    _check(outcome, USUAL)
    # Else the damage would say nothing.
    assert outcome["num_read"] > 0
    assert outcome["num_refused"] > USUAL // 10


@pytest.mark.hostile
@pytest.mark.parametrize("sort", SORTS)
def test_very_much_hostile_input(sort: str) -> None:
    """As many as the environment variable HOSTILE_MUTATIONS says, else 20,000, other ones than above."""
    _check(_outcome(sort, USUAL, MANY), MANY)
