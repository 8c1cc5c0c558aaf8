"""Finds families, formats and metrics by name: a file of that name here, or an entry point of another package."""

from __future__ import annotations

import importlib
import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.text import shown, suggestion

_PLACES = {
    "families": ("lora_diffusion.families", "FAMILY"),
    "formats": ("lora_diffusion.formats", "FORMAT"),
    "metrics": ("lora_diffusion.scoring.metrics", "METRIC"),
}
"""Group -> the package whose files hold its objects, and the attribute by which a file offers one."""


def available(group: str) -> list[str]:
    """Returns the sorted names of a group: "families", "formats" or "metrics". Imports none of them."""
    return sorted({*_files(group), *(point.name for point in _points(group))})


@cache
def _files(group: str) -> frozenset[str]:
    """Names the files of a package that assign the attribute, by their text alone."""
    package, attribute = _PLACES[group]
    offers = re.compile(rf"^{attribute}\b", re.MULTILINE)
    folders = importlib.import_module(package).__path__
    files = [path for folder in folders for path in Path(folder).glob("*.py")]
    return frozenset(path.stem for path in files if offers.search(path.read_text("utf-8")))


def find(group: str, name: str) -> Any:
    """Returns the object of that name, imported only now.

    Raises:
        ConfigError: no such name; the message offers close ones.
    """
    names = available(group)
    if name not in names:
        hint = suggestion(name, names)
        raise ConfigError(f"There is no '{shown(name)}' among the {group}{hint}. Known: {', '.join(names)}.")
    package, attribute = _PLACES[group]
    for point in _points(group):
        if point.name == name:
            return point.load()
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


@cache
def _points(group: str) -> tuple[EntryPoint, ...]:
    """Returns what other packages bring; looking through all that are installed takes a tenth of a second."""
    return tuple(entry_points(group=f"lora_diffusion.{group}"))
