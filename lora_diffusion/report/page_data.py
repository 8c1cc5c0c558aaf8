"""The numbers beside a page: files of its name that end in .json and .csv, which never take the place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import read_json, write_json, write_text
from lora_diffusion.core.privacy import public, public_path
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Evaluation

RUN_KEYS = frozenset({"choice", "evaluation", "training"})
COMPARISON_KEYS = frozenset({"differences", "columns", "entries"})
"""What the JSON of a page holds, by which it is known again."""


def write_beside(page: Path, values: Mapping[str, Any], tables: Mapping[Path, Evaluation]) -> tuple[Path, ...]:
    """Writes the numbers of a page, without paths of this machine, and returns their files, the JSON first.

    Args:
        page: the HTML file.
        values: with RUN_KEYS or COMPARISON_KEYS.
        tables: CSV file -> the evaluation whose scores it gets.

    Raises:
        ConfigError: a file that is none of these is in the way, say the evaluation itself.
    """
    numbers = page.with_suffix(".json")
    check_beside(page, list(tables))
    write_json(numbers, public(dict(values)))
    for path, evaluation in tables.items():
        write_text(path, results.to_csv(replace(one, detail=public_path(one.detail)) for one in evaluation.scores))
    return numbers, *tables


def check_beside(page: Path, tables: Sequence[Path]) -> None:
    """Checks that the files beside a page are not there, or are those of an earlier page.

    Raises:
        ConfigError: one of them is something else.
    """
    numbers = page.with_suffix(".json")
    header = results.to_csv(())
    is_own = _is_of_a_page(numbers)
    taken = [] if is_own or not numbers.exists() else [numbers]
    # The scores of an evaluation look like those of a page, which never lie there without its JSON.
    taken += [path for path in tables if path.exists() and not (is_own and _starts_with(path, header))]
    if taken:
        raise ConfigError(
            f"--output {page}: the numbers of the page would be written over {taken[0]}, which is not from a page; "
            "name another file, say report.html."
        )


def _is_of_a_page(path: Path) -> bool:
    try:
        values = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.keys() in (RUN_KEYS, COMPARISON_KEYS)


def _starts_with(path: Path, text: str) -> bool:
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        return stream.read(len(text)) == text
