"""Algebra on the two factors of a change of weight, without the dense matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def delta_norm(down: Tensor, up: Tensor, scale: float) -> float:
    """Returns the Frobenius norm of scale * up @ down.

    With down^T = Q1 R1 and up = Q2 R2 the norm is that of R2 @ R1^T, which has rank x rank numbers.

    Args:
        down: [rank, in] or [rank, in, k, k].
        up: [out, rank] or [out, rank, 1, 1].
        scale: alpha / rank.

    >>> import torch
    >>> round(delta_norm(torch.ones(1, 3), torch.ones(4, 1), 0.5), 6) == round(0.5 * 12**0.5, 6)
    True
    """
    import torch

    small_down = torch.linalg.qr(down.flatten(1).float().T, mode="r").R
    small_up = torch.linalg.qr(up.flatten(1).float(), mode="r").R
    return abs(scale) * float(torch.linalg.matrix_norm(small_up @ small_down.T))
