"""What a merge method must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from lora_diffusion.core.adapter_state import ModuleKey


class Method(Protocol):
    """A way to make one adapter of several. One object METHOD in `compose/methods/<name>.py`."""

    name: str
    """The file name."""
    summary: str
    """What it does, in a few words for help texts."""
    paper: str
    """Where it comes from: authors, year, arXiv number; "" where it is plain arithmetic."""

    def combine(self, terms: Sequence[Any], rule: Any, kernels: Mapping[ModuleKey, tuple[int, ...]]) -> Any:
        """Returns the adapter that does what several do together, as `compose.linear.Sum`.

        Args:
            terms: `compose.linear.Term`, at least one, all of one base.
            rule: `algebra.lowrank.RankRule`, the rank of each module; None keeps all that there is.
            kernels: module -> size of its convolution, for adapters whose tensors do not tell it.

        Raises:
            AdapterFileError: two adapters have a module in different shapes.
            UnsupportedError: a variant that the method cannot combine, or not without a rule.
        """
