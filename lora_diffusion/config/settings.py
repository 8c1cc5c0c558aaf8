"""What stands beside the default of a setting: the values that are allowed, and whether it may change on `--resume`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_diffusion.core import registry

_ALLOWED, _MAY_CHANGE = "allowed", "may change on resume"


@dataclass(frozen=True)
class Allowed:
    """The values that a setting may have; null and what is still to be given are not asked about."""

    test: Callable[[Any], bool]
    text: str
    """What a value must be, for messages, say "must be greater than 0"."""


@dataclass(frozen=True)
class Choice:
    """Allows a text, or a list of texts, out of a few."""

    listed: tuple[str, ...] = ()
    group: str = ""
    """Of the registry, whose names are allowed instead of those listed: the choices of other packages come with it."""
    is_list: bool = False

    @property
    def choices(self) -> Sequence[str]:
        """The names that are allowed."""
        return registry.available(self.group) if self.group else self.listed

    @property
    def text(self) -> str:
        """What a value must be, for messages."""
        return f"must {'name one or more' if self.is_list else 'be one'} of {', '.join(self.choices)}"

    def test(self, value: Any) -> bool:
        """Says whether a text is one of the choices, or whether all texts of a list are."""
        choices = self.choices
        return value in choices if isinstance(value, str) else len(value) > 0 and set(value) <= set(choices)


Rule = Allowed | Choice

POSITIVE = Allowed(lambda v: v > 0, "must be greater than 0")
NOT_NEGATIVE = Allowed(lambda v: v >= 0, "must be 0 or greater")
AT_LEAST_ONE = Allowed(lambda v: v >= 1, "must be 1 or greater")
SHARE = Allowed(lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
PART = Allowed(lambda v: 0 < v <= 1, "must be greater than 0 and at most 1")
FILLED = Allowed(lambda v: len(v) > 0, "must not be empty")
SEEDS = Allowed(
    lambda v: len(v) > 0 and all(0 <= seed < 2**63 for seed in v), "must be one or more numbers, 0 or greater"
)
MAX_DENOISING_STEPS = 999
"""Bases know 1000 noise levels, and samplers that look one step ahead need one more than their steps."""


def one_of(*choices: str) -> Choice:
    """Allows one of these texts."""
    return Choice(choices)


def from_to(smallest: float, largest: float, words: str) -> Allowed:
    """Allows the numbers of a range, both ends included."""
    return Allowed(lambda v: smallest <= v <= largest, words)


def different(smallest: float, largest: float, noun: str, unit: str = "", *, fewest: int = 1) -> Allowed:
    """Allows a list of different numbers of a range, both ends included."""
    return Allowed(
        lambda v: len(v) >= fewest and len(set(v)) == len(v) and all(smallest <= one <= largest for one in v),
        f"must be {noun} between {smallest:g} and {largest:g}{unit}",
    )


POSITIVE_WEIGHTS = Allowed(
    lambda v: len(v) > 0 and len(set(v)) == len(v) and all(weight > 0 and math.isfinite(weight) for weight in v),
    "must be one or more different numbers greater than 0",
)


def fixed(default: Any, allowed: Rule | None = None) -> Any:
    """Declares a setting that decides the result of a run, so that it must stay as it is on `--resume`.

    A dataclass field without a declaration is fixed, too, and has any value of its type.
    """
    return dataclasses.field(default=default, metadata={_ALLOWED: allowed, _MAY_CHANGE: False})


def free(default: Any, allowed: Rule | None = None) -> Any:
    """Declares a setting that may change on `--resume`.

    It says where something lies, whose content is compared; how long, how fast or how visibly is computed; or how the
    trained adapter is shown, scored and written; and not what is learnt.
    """
    return dataclasses.field(default=default, metadata={_ALLOWED: allowed, _MAY_CHANGE: True})


def allowed_values(section_type: type[Any], key: str) -> Rule | None:
    """Returns what a setting may be; None for all values of its type."""
    rule: Rule | None = _declaration(section_type, key).get(_ALLOWED)
    return rule


def may_change(section_type: type[Any], key: str) -> bool:
    """Says whether a setting may change on `--resume`."""
    return bool(_declaration(section_type, key).get(_MAY_CHANGE, False))


def _declaration(section_type: type[Any], key: str) -> Mapping[str, Any]:
    """Returns what `fixed` or `free` said of a setting; a class that only gives another default need not repeat it."""
    owners = (vars(owner).get("__dataclass_fields__", {}) for owner in section_type.__mro__)
    return next((fields[key].metadata for fields in owners if key in fields and fields[key].metadata), {})
