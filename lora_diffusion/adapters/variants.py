"""What each variant of adapter is made of and can do. Importing this file does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diffusion.algebra.delta import kronecker_split
from lora_diffusion.core import registry
from lora_diffusion.core.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""


def kaiming_uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Returns uniform values within 1 / sqrt(inputs), [rank, in] or of any shape, as PEFT and LyCORIS begin."""
    import torch
    from torch import nn

    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=rng)


@dataclass(frozen=True)
class Variant:
    """One variant of adapter."""

    name: str
    """Value of `adapter.variant`."""
    summary: str
    shapes: Callable[[Sequence[int], int, int], Shapes]
    """(shape of the frozen weight, rank, adapter.lokr_factor) -> the tensors that are trained."""
    zeros: frozenset[str]
    """Those of them that begin at zero, so that a new adapter changes nothing."""
    stored: str
    """`ModuleAdapter.variant` of the result."""
    quantizations: tuple[str, ...] = ("none", "8bit", "nf4")
    """Values of `model.quantization` that it can be trained on."""
    alpha_power: float = 0.0
    """Alpha of the result, whose scale is alpha / rank, is adapter.alpha * rank ** alpha_power."""
    added_targets: tuple[str, ...] = ()
    """Groups that are targets besides those of `adapter.targets`, in every part that has them."""
    has_dropout: bool = True
    """Whether `adapter.dropout` works."""
    first_values: Callable[[tuple[int, ...], torch.Generator], Tensor] = kaiming_uniform
    """(shape, CPU generator) -> what the others begin with, but for a magnitude, which begins as the weight has it."""
    has_largest_rank: bool = True
    """Whether a rank above the smaller side of the weight is a mistake."""


def largest_rank(shape: Sequence[int]) -> int:
    """Returns the rank that a weight can have at most.

    >>> largest_rank((320, 4, 3, 3))
    36
    """
    return min(shape[0], math.prod(shape[1:]))


def _lora(shape: Sequence[int], rank: int, factor: int) -> Shapes:
    del factor
    return {"down": (rank, *shape[1:]), "up": (shape[0], rank, *(1,) * (len(shape) - 2))}


def _dora(shape: Sequence[int], rank: int, factor: int) -> Shapes:
    return {**_lora(shape, rank, factor), "magnitude": (1, shape[1], *(1,) * (len(shape) - 2))}


def _dora_out(shape: Sequence[int], rank: int, factor: int) -> Shapes:
    return {**_lora(shape, rank, factor), "magnitude": (shape[0], *(1,) * (len(shape) - 1))}


def _loha(shape: Sequence[int], rank: int, factor: int) -> Shapes:
    del factor
    inputs = math.prod(shape[1:])
    return {"w1_a": (shape[0], rank), "w1_b": (rank, inputs), "w2_a": (shape[0], rank), "w2_b": (rank, inputs)}


def _lokr(shape: Sequence[int], rank: int, factor: int) -> Shapes:
    (first_out, second_out), (first_in, second_in) = (kronecker_split(side, factor) for side in shape[:2])
    first: Shapes = {"w1": (first_out, first_in)}
    if rank >= max(second_out, second_in) / 2:
        return {**first, "w2": (second_out, second_in, *shape[2:])}
    return {**first, "w2_a": (second_out, rank), "w2_b": (rank, second_in * math.prod(shape[2:]))}


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="lora",
            summary="alpha / rank * up @ down is added to the weight (Hu et al. 2021, arXiv 2106.09685)",
            shapes=_lora,
            zeros=frozenset({"up"}),
            stored="lora",
        ),
        Variant(
            name="rslora",
            summary="lora with scale alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, arXiv 2312.03732)",
            shapes=_lora,
            zeros=frozenset({"up"}),
            stored="lora",
            alpha_power=0.5,
        ),
        Variant(
            name="locon",
            summary="lora on the targets and on all convolutions of the UNet (Yeh et al. 2023, arXiv 2309.14859)",
            shapes=_lora,
            zeros=frozenset({"up"}),
            stored="lora",
            added_targets=("conv",),
        ),
        Variant(
            name="dora",
            summary="lora, and the length of each input column of the weight is trained by itself (Liu et al. 2024, "
            "arXiv 2402.09353): for ComfyUI, Forge and A1111, which agree on this axis",
            shapes=_dora,
            zeros=frozenset({"up"}),
            stored="dora",
        ),
        Variant(
            name="dora_out",
            summary="dora with the length of each output row, as PEFT has it: for diffusers",
            shapes=_dora_out,
            zeros=frozenset({"up"}),
            stored="dora_out",
        ),
        Variant(
            name="loha",
            summary="the product, element by element, of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv "
            "2108.06098): rank^2 in twice the parameters",
            shapes=_loha,
            zeros=frozenset({"w2_b"}),
            stored="loha",
            quantizations=("none",),
            has_dropout=False,
        ),
        Variant(
            name="lokr",
            summary="the Kronecker product of a small matrix and a low-rank one (Yeh et al. 2023, arXiv 2309.14859): "
            "very small files",
            shapes=_lokr,
            zeros=frozenset({"w2", "w2_b"}),
            stored="lokr",
            quantizations=("none",),
            has_dropout=False,
            has_largest_rank=False,
        ),
    )
}


FULL = Variant(
    name="full",
    summary="the whole change of the weight, as a lora of the largest rank whose square factor is the identity",
    shapes=_lora,
    zeros=frozenset({"down", "up"}),
    stored="lora",
    has_dropout=False,
)
"""What the parts in `adapter.full` get. Its file is that of a lora, which every tool reads, merges and cuts down."""


def every() -> list[Variant]:
    """Returns all variants, those of other packages included."""
    return [registry.find("variants", name) for name in registry.available("variants")]


def find(name: str, quantization: str = "none") -> Variant:
    """Returns the variant of that name.

    Args:
        name: value of `adapter.variant`.
        quantization: value of `model.quantization`.

    Raises:
        ConfigError: no such variant.
        UnsupportedError: it cannot train on so stored a base; the message says what can.

    >>> find("dora").shapes((640, 320), 4, -1)["magnitude"]
    (1, 320)
    """
    variant: Variant = registry.find("variants", name, "adapter.variant")
    if quantization not in variant.quantizations:
        able = [other.name for other in every() if quantization in other.quantizations]
        remedy = f"use one of {', '.join(able)} or " if able else ""
        raise UnsupportedError(
            f"adapter.variant={name} cannot train on a {quantization} base; {remedy}"
            f"set model.quantization={' or '.join(variant.quantizations)}."
        )
    return variant
