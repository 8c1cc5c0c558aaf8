"""What each kind of adapter is made of and can do. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import suggestion


@dataclass(frozen=True)
class Variant:
    """One kind of adapter."""

    name: str
    """Value of `adapter.variant`, and `ModuleAdapter.variant`."""
    summary: str
    tensors: Mapping[str, str]
    """Tensor name in a ModuleAdapter -> attribute of the PEFT layer that holds it."""
    quantizations: tuple[str, ...]
    """Values of `model.quantization` that it can be trained on."""


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="lora",
            summary="alpha / rank * up @ down is added to the weight (Hu et al. 2021, arXiv 2106.09685)",
            tensors={"down": "lora_A", "up": "lora_B"},
            quantizations=("none", "8bit", "nf4"),
        ),
    )
}


def find(name: str, quantization: str = "none") -> Variant:
    """Returns the variant of that name.

    Args:
        name: value of `adapter.variant`.
        quantization: value of `model.quantization`.

    Raises:
        UnsupportedError: no such variant, or it cannot train on so stored a base; the message says what can.

    >>> find("lora").tensors["down"]
    'lora_A'
    """
    if name not in VARIANTS:
        raise UnsupportedError(
            f"adapter.variant={name} does not exist{suggestion(name, VARIANTS)}. Use one of {', '.join(VARIANTS)}."
        )
    variant = VARIANTS[name]
    if quantization not in variant.quantizations:
        able = [other.name for other in VARIANTS.values() if quantization in other.quantizations]
        remedy = f"use one of {', '.join(able)} or " if able else ""
        raise UnsupportedError(
            f"adapter.variant={name} cannot train on a {quantization} base; {remedy}"
            f"set model.quantization to one of {', '.join(variant.quantizations)}."
        )
    return variant
