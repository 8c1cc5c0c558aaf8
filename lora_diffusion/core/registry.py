"""Finds families, formats, metrics, variants and more by name: objects of this package or of another one."""

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
    "methods": ("lora_diffusion.compose.methods", "METHOD"),
    "timesteps": ("lora_diffusion.diffusion.timesteps", "TIMESTEPS"),
    "noises": ("lora_diffusion.diffusion.noise", "NOISES"),
    "weightings": ("lora_diffusion.diffusion.weighting", "WEIGHTINGS"),
    "losses": ("lora_diffusion.diffusion.losses", "LOSSES"),
    "variants": ("lora_diffusion.adapters.variants", "VARIANTS"),
}
"""Group -> a package whose files each offer an object by this attribute, or a module with a table of them."""


def available(group: str) -> list[str]:
    """Returns the sorted names of a group, a key of `_PLACES` such as "families"; of files imports none."""
    return sorted({*_installed(group), *(point.name for point in _points(group))})


@cache
def _installed(group: str) -> frozenset[str]:
    """Names the rows of the table, or the files of the package that assign the attribute, by their text alone."""
    place, attribute = _PLACES[group]
    module = importlib.import_module(place)
    if not hasattr(module, "__path__"):
        return frozenset(getattr(module, attribute))
    offers = re.compile(rf"^{attribute}\b", re.MULTILINE)
    files = [path for folder in module.__path__ for path in Path(folder).glob("*.py")]
    return frozenset(path.stem for path in files if offers.search(path.read_text("utf-8")))


def find(group: str, name: str, setting: str = "") -> Any:
    """Returns the object of that name, imported only now.

    Args:
        group: as for `available`.
        name: a name of it.
        setting: where the user gave the name, for the message, say "model.family".

    Raises:
        ConfigError: no such name; the message offers close ones.
    """
    names = available(group)
    if name not in names:
        given = f"{setting}={shown(name)}: there" if setting else "There"
        raise ConfigError(
            f"{given} is no '{shown(name)}' among the {group}{suggestion(name, names)}. Known: {', '.join(names)}."
        )
    for point in _points(group):
        if point.name == name:
            return point.load()
    place, attribute = _PLACES[group]
    module = importlib.import_module(place)
    if not hasattr(module, "__path__"):
        return getattr(module, attribute)[name]
    return getattr(importlib.import_module(f"{place}.{name}"), attribute)


def _points(group: str) -> tuple[EntryPoint, ...]:
    """Returns what other packages bring."""
    return tuple(_every_point().select(group=f"lora_diffusion.{group}"))


@cache
def _every_point() -> Any:
    """Looks through all packages that are installed, which takes some hundredths of a second."""
    return entry_points()
