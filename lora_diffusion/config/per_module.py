"""Settings of single modules, each a text TARGET=VALUE with a target as in `adapter.targets`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.text import shown

PER_MODULE: Mapping[str, str] = {
    "adapter.module_ranks": "attn=8",
    "adapter.module_alphas": "attn=4",
    "train.module_learning_rates": "attn=1e-4",
}
"""Key of a list of such settings -> one that it can hold."""

_MOST_DIGITS = 16


@dataclass(frozen=True, eq=False)
class Entry:
    """One such setting. No two are equal, as each must have a use of its own."""

    key: str
    """The list that it stands in."""
    target: str
    value: float
    """Greater than 0; of module_ranks a whole number."""

    def __str__(self) -> str:
        """Returns what messages call it."""
        return f'{self.key}: "{self.target}={self.value:g}"'


def read_entry(key: str, text: str) -> Entry:
    """Returns what an entry says; the value follows the last "=", since a pattern may hold others.

    Raises:
        ConfigError: it has another form, or no such number.

    >>> read_entry("adapter.module_ranks", "re:.*(?=attn).*=8").target
    're:.*(?=attn).*'
    """
    target, _, number = (side.strip() for side in text.rpartition("="))
    value = int(number) if number.isdecimal() and len(number) < _MOST_DIGITS else read_number(number)
    is_rank = key == "adapter.module_ranks"
    if not target or not 0 < value < math.inf or (is_rank and not isinstance(value, int)):
        noun = "whole number" if is_rank else "number"
        raise ConfigError(
            f"{key}: {shown(text)!r} must be TARGET=VALUE, the value a {noun} greater than 0, as in {PER_MODULE[key]}"
        )
    return Entry(key, target, value)


def read_number(text: str) -> float:
    """Returns the number that a text spells, NaN where it spells none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
