"""Adapters in PEFT's tensors, which diffusers keeps too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.types import ModuleAdapter
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._arrays import Array
from lora_diffusion.formats._holding import BIAS, EMBEDDINGS
from lora_diffusion.formats._spelling import PEFT

if TYPE_CHECKING:
    import torch

WRONG_AXIS = (
    "PEFT has a magnitude for each output, and this adapter one for each input. Train with adapter.variant=dora_out, "
    "or merge it into the base"
)


_OTHER = "PEFT has other layers for it, or none"
NOT_IN_PEFT = {
    **dict.fromkeys(("loha+dora", "loha+dora_out", "lokr+dora", "lokr+dora_out"), _OTHER),
    **dict.fromkeys(("full", "norm", "set", "ia3", "oft", "boft", "glora"), _OTHER),
    BIAS: "neither PEFT nor diffusers reads a change of a bias as a difference",
    EMBEDDINGS: "PEFT and diffusers keep them in files of their own; leave them out with --embeddings drop",
}
"""What the spellings of PEFT and diffusers cannot hold -> the reason."""


def check_one_kind(part: str, adapters: Iterable[ModuleAdapter]) -> None:
    """Checks that adapters are of one variant, which PEFT records once for all of them.

    Raises:
        UnsupportedError: there are several.
    """
    variants = sorted({adapter.variant for adapter in adapters})
    if len(variants) > 1:
        raise UnsupportedError(
            f"PEFT and diffusers hold one kind of adapter in each part, but {part} has {' and '.join(variants)}. "
            "Keep the kohya spelling."
        )


def peft_tensors(name: str, adapter: ModuleAdapter, dtype: torch.dtype | None) -> dict[str, Array]:
    """Returns the tensors of a module by their names in a file.

    Raises:
        NonFiniteError: a value does not fit `dtype`.
        UnsupportedError: a lora with a Tucker core.
    """
    if "mid" in adapter.tensors:
        raise UnsupportedError(
            f"{name} is a lora with a Tucker core, which PEFT and diffusers do not have; keep the kohya spelling."
        )
    tensors = dict(adapter.tensors)
    if "magnitude" in tensors:
        # PEFT: [out], and [1, out, 1, 1] on a convolution.
        flat = tensors["magnitude"].reshape(-1)
        tensors["magnitude"] = flat if tensors["down"].ndim == 2 else flat.reshape(1, -1, 1, 1)
    suffixes = PEFT["lora" if adapter.variant == "dora_out" else adapter.variant]
    return {
        f"{name}{suffix}": _safetensors.cast(name, tensors[tensor], dtype)
        for tensor, suffix in suffixes.items()
        if tensor in tensors
    }
