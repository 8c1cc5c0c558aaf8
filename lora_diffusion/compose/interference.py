"""How much adapters disturb each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from lora_diffusion.algebra import lowrank
from lora_diffusion.algebra.lowrank import Factors
from lora_diffusion.compose.linear import Term
from lora_diffusion.core.adapter_state import ModuleKey


@dataclass(frozen=True)
class Meeting:
    """How two adapters meet in one module."""

    key: ModuleKey
    cosine: float
    share: float
    """Of the sum of the sizes of all inner products of the part."""


@dataclass(frozen=True)
class Overlap:
    """How two adapters meet in one part, at their weights.

    A cosine is the inner product of two changes over the product of their norms: 0 where they do not touch each other,
    towards 1 where both ask for the same, so that the sum does too much, towards -1 where one undoes the other.
    """

    first: str
    second: str
    part: str
    cosine: float
    """Of the changes of all modules together, so that a module counts by its norms."""
    most: tuple[Meeting, ...]
    """The modules that contribute most to it."""


def overlaps(terms: Sequence[Term], num_modules: int = 5) -> list[Overlap]:
    """Compares every pair of adapters in every part that both have; modules without factors are left out.

    Args:
        terms: adapters of one base with their weights.
        num_modules: how many modules to name for each pair and part.
    """
    sides = [_Side(term) for term in terms]
    return [
        _overlap(first, second, part, num_modules)
        for first, second in combinations(sides, 2)
        for part in first.term.state.parts()
        if part in second.term.state.parts()
    ]


class _Side:
    def __init__(self, term: Term) -> None:
        self.term = term
        products = ((key, term.factors(key)) for key in term.state.modules)
        self.factors: dict[ModuleKey, Factors] = {key: factors for key, factors in products if factors is not None}
        self.norms = {key: lowrank.norm(factors) for key, factors in self.factors.items()}

    def norm(self, part: str) -> float:
        return math.hypot(*(norm for key, norm in self.norms.items() if key.part == part))


def _overlap(first: _Side, second: _Side, part: str, num_modules: int) -> Overlap:
    shared = [key for key in first.factors if key.part == part and key in second.factors]
    products = {key: lowrank.inner(first.factors[key], second.factors[key]) for key in shared}
    touching = {key: product for key, product in products.items() if product}
    whole = sum(map(abs, touching.values()))
    largest = sorted(touching, key=lambda key: abs(touching[key]), reverse=True)[:num_modules]
    meetings = (
        Meeting(key, touching[key] / (first.norms[key] * second.norms[key]), abs(touching[key]) / whole)
        for key in largest
    )
    scale = first.norm(part) * second.norm(part)
    cosine = sum(products.values()) / scale if scale else 0.0
    return Overlap(first.term.name, second.term.name, part, cosine, tuple(meetings))
