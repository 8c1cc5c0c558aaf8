"""Tells in what two recordings differ: `python -m tests.behaviour.compare BEFORE AFTER`; exits with 1 if they do.

What a command prints may be put in other words: of its texts only the numbers, names and paths are compared; --words
shows them whole, and also those that are no difference. What a command writes is compared as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FACT = re.compile(r"[\w-]*(?:[\d=/]|\w[._]\w)[\w./=:+-]*")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each single value, and the length of each list, under its path of keys."""
    if isinstance(value, dict | list):
        yield name, f"{len(value)} values" if isinstance(value, list) else "keys"
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name} > {key}" if name else str(key))
    else:
        yield name, value


def facts(text: str) -> Counter[str]:
    """Returns the numbers, names and paths in a text.

    >>> facts("train.rank=0: must be 1 or more") == facts("train.rank=0 is too small; give 1 or more.")
    True
    >>> facts("6 pictures in a.png") == facts("7 images in a.png")
    False
    """
    return Counter(fact.rstrip(".:") for fact in _FACT.findall(text))


def main() -> int:
    """Compares the parts that both folders hold."""
    parser = argparse.ArgumentParser(description="Tell in what two recordings differ.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--words", action="store_true", help="show whole texts, and those in other words too")
    given = parser.parse_args()
    num_differences = num_reworded = 0
    parts = sorted(
        {path.name for path in given.before.glob("*.json")} & {path.name for path in given.after.glob("*.json")}
    )
    if not parts:
        parser.error("there is no part that both folders hold")
    for part in parts:
        before, after = (
            dict(leaves(json.loads((folder / part).read_text()))) for folder in (given.before, given.after)
        )
        for name in before | after:
            first, second = before.get(name, "nothing"), after.get(name, "nothing")
            if first == second:
                continue
            is_printed = " " in str(first) and " " in str(second) and " > files > " not in name
            pieces = [facts(value) if is_printed else Counter(str(value).splitlines()) for value in (first, second)]
            is_reworded = is_printed and pieces[0] == pieces[1]
            num_reworded += is_reworded
            num_differences += not is_reworded
            if given.words or not is_reworded:
                only = ["\n    ".join((one - other).elements()) for one, other in (pieces, pieces[::-1])]
                shown = (first, second) if given.words else only
                print(f"{part}: {name}\n  - {shown[0]}\n  + {shown[1]}")
    print(f"{', '.join(parts)}: {num_differences} differences, {num_reworded} texts in other words")
    return 1 if num_differences else 0


if __name__ == "__main__":
    sys.exit(main())
