"""Random generators that depend on named numbers only, so that a stopped run continues with the same draws."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *path: str | int) -> int:
    """Returns a 63-bit seed that is the same on every machine for equal arguments.

    Args:
        seed: the seed of the run.
        path: what the draw is for, say ("loss", epoch, index).
    """
    text = "\x1f".join(str(step) for step in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def derive(seed: int, *path: str | int) -> torch.Generator:
    """Returns a CPU generator seeded by `derive_seed`."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *path))
