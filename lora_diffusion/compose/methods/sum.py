"""The weighted sum of the changes: what generating with all adapters at once gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lora_diffusion.algebra.lowrank import RankRule
from lora_diffusion.compose.linear import Sum, Term, add
from lora_diffusion.core.adapter_state import ModuleKey


class WeightedSum:
    """Adds changes up on their factors: exactly, or to the nearest change of a smaller rank (Eckart and Young 1936)."""

    name = "sum"
    summary = "adds the changes up, exactly or at a smaller rank"
    paper = ""

    def combine(
        self, terms: Sequence[Term], rule: RankRule | None, kernels: Mapping[ModuleKey, tuple[int, ...]]
    ) -> Sum:
        """Returns the sum; see `compose.linear.add`."""
        return add(terms, rule, kernels)


METHOD = WeightedSum()
