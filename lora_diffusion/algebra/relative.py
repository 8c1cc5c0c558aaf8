"""Changes of weight that are made of the weight itself: ia3, oft, boft, glora, and a weight that takes its place.

The formulas are those that ComfyUI applies to a file at strength 1 (`comfy/weight_adapter/{oft,boft,glora}.py` and
`comfy/lora.py`, commit a125cd84), and for ia3, which it does not read, that of LyCORIS (`lycoris/modules/ia3.py`).
Tensors are float32; their names are those of ModuleAdapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NORM_STEP = 1e-8
"""Added to the norm of a rotation's matrix before the two are compared."""


def _set(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    del alpha
    return tensors["value"].reshape(weight.shape) - weight


def _ia3(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns weight * factor of each input or output (Liu et al. 2022, arXiv 2205.05638, section 3.3)."""
    del alpha
    axis = 1 if bool(tensors["on_input"].flatten()[0]) else 0
    sizes = [1] * weight.dim()
    sizes[axis] = -1
    return weight * tensors["factor"].reshape(sizes)


def _rotations(blocks: Tensor, alpha: float) -> Tensor:
    """Returns (I + Q) (I - Q)^-1 of Q = blocks - blocks^T, whose norm over all is at most alpha unless that is 0.

    Source: the Cayley transform of Qiu et al. 2023, arXiv 2306.07280, section 4.
    """
    import torch

    skew = blocks - blocks.transpose(-1, -2)
    norm = torch.linalg.vector_norm(skew) + _NORM_STEP
    if alpha > 0 and norm > alpha:
        skew = skew * (alpha / norm)
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
    return rotations


def _oft(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns rescale * R^T @ weight - weight, R acting on blocks of outputs (arXiv 2306.07280, section 3)."""
    import torch

    blocks = tensors["blocks"]
    rows = weight.reshape(*blocks.shape[:2], *weight.shape[1:])
    turned = torch.einsum("knm,kn...->km...", _rotations(blocks, alpha), rows).reshape(weight.shape)
    return _rescaled(turned, tensors) - weight


def _boft(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns rescale * R_m ... R_1 @ weight - weight, each R on other groups of outputs.

    Source: Liu et al. 2023, arXiv 2311.06243, section 5.
    """
    import torch

    turned, rest = weight, weight.shape[1:]
    half = tensors["blocks"].shape[-1] // 2
    for step, own in enumerate(_rotations(tensors["blocks"], alpha)):
        width = 2**step * half
        rows = turned.reshape(-1, 2, width, *rest).transpose(1, 2).reshape(*own.shape[:2], *rest)
        rows = torch.einsum("bij,bj...->bi...", own, rows)
        turned = rows.reshape(-1, width, 2, *rest).transpose(1, 2).reshape(weight.shape)
    return _rescaled(turned, tensors) - weight


def _rescaled(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    if "rescale" not in tensors:
        return weight
    return weight * tensors["rescale"].reshape(-1, *[1] * (weight.dim() - 1))


def _glora(tensors: Mapping[str, Tensor], alpha: float, weight: Tensor) -> Tensor:
    """Returns alpha / rank * (b1 @ b2 + weight @ a1 @ a2), a1 and a2 acting on the inputs.

    Source: Chavan et al. 2023, arXiv 2306.07967, equation 8, as LyCORIS trains it.
    """
    import torch

    a1, a2, b1, b2 = _turned_round(tensors)
    scale = alpha / len(a2)
    if len(a1) == weight.shape[1]:
        own = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
    else:
        own = (weight.flatten(1) @ a1 @ a2).reshape(weight.shape)
    return scale * (own + (b1 @ b2).reshape(weight.shape))


def _turned_round(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Returns a1, a2, b1 and b2 as they are since 2024, when LyCORIS exchanged the numbers."""
    a1, a2, b1, b2 = (tensors[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    return (
        (a2, a1, b2, b1)
        if is_old_glora({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        else (a1, a2, b1, b2)
    )


def is_old_glora(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Says whether the first factors are those next to the inputs, as they were before 2024."""
    rank, width = shapes["a1"][:2]
    return rank <= width and shapes["a2"][:2] == (width, rank) and shapes["b2"][1] == shapes["b1"][0] == rank


def glora_shape(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Returns outputs, and inputs times the size of the kernel, of the weight that a glora changes.

    Raises:
        ValueError: the factors are of different ranks.
    """
    old = is_old_glora(shapes)
    up, down = (shapes["b2"], shapes["b1"]) if old else (shapes["b1"], shapes["b2"])
    inner, outer = (shapes["a1"], shapes["a2"]) if old else (shapes["a2"], shapes["a1"])
    if not up[1] == down[0] == inner[0] == outer[1] or inner[1] != outer[0]:
        raise ValueError("the factors are of different ranks")
    return up[0], math.prod(down[1:])


CHANGES: Mapping[str, Callable[[Mapping[str, Tensor], float, Tensor], Tensor]] = {
    "set": _set,
    "ia3": _ia3,
    "oft": _oft,
    "boft": _boft,
    "glora": _glora,
}
"""Variant -> (tensors, alpha, weight of the base) to the change of the weight."""
