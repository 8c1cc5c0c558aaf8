"""Finds families, formats and metrics by name: a file of that name here, or an entry point of another package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.keymap import suggestion
from lora_diffusion.core.logs import shown

_ROOMS = {
    "families": ("lora_diffusion.families", "FAMILY"),
    "formats": ("lora_diffusion.formats", "FORMAT"),
    "metrics": ("lora_diffusion.evaluation.metrics", "METRIC"),
}


_SHARED = {"families": (), "formats": ("clients", "metadata", "thumbnail", "verified"), "metrics": ()}
"""Files of a room that are not one of its kind."""


def available(kind: str) -> list[str]:
    """Returns the sorted names of a kind: "families", "formats" or "metrics". Imports none of them."""
    package = importlib.import_module(_ROOMS[kind][0])
    files = [module.name for module in pkgutil.iter_modules(package.__path__)]
    own = {name for name in files if not name.startswith("_") and name not in _SHARED[kind]}
    return sorted(own | {point.name for point in _points(kind)})


def find(kind: str, name: str) -> Any:
    """Returns the object of that name, imported only now.

    Raises:
        ConfigError: no such name; the message offers close ones.
    """
    names = available(kind)
    if name not in names:
        hint = suggestion(name, names)
        raise ConfigError(f"There is no '{shown(name)}' among the {kind}{hint}. Known: {', '.join(names)}.")
    package, attribute = _ROOMS[kind]
    for point in _points(kind):
        if point.name == name:
            return point.load()
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


@cache
def _points(kind: str) -> tuple[EntryPoint, ...]:
    """Returns what other packages bring; looking through all that are installed takes a tenth of a second."""
    return tuple(entry_points(group=f"lora_diffusion.{kind}"))
