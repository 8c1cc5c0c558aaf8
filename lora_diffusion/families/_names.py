"""How files name the modules of the Stable Diffusion 1 and 2 families (data, and one function over it)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, dotted_key_map, flat_key_map

_FLAT = {"kohya": {"unet": "lora_unet_", "text_encoder": "lora_te_"}}
_DOTTED = {
    "diffusers": {"unet": "unet.", "text_encoder": "text_encoder."},
    "peft": {"unet": "unet.", "text_encoder": "text_encoder."},
}


def key_map(format_name: str, parts: Mapping[str, nn.Module]) -> KeyMap:
    """Maps every linear and convolution layer of the parts to its name in a file.

    transformers 5.6 flattened CLIPTextModel: its paths begin with "encoder.", while files of every client say
    "text_model.encoder.". PEFT folders are loaded on the live model and keep the live path.

    Raises:
        UnsupportedError: the format has no names for this family.
    """
    paths = {
        part: [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for part, network in parts.items()
    }
    is_flat = "text_encoder" in paths and not any(path.startswith("text_model.") for path in paths["text_encoder"])
    if format_name in _FLAT:
        extra = "text_model_" if is_flat else ""
        return flat_key_map(paths, _with_text(_FLAT[format_name], extra))
    if format_name in _DOTTED:
        extra = "text_model." if is_flat and format_name != "peft" else ""
        return dotted_key_map(paths, _with_text(_DOTTED[format_name], extra))
    known = ", ".join(sorted({*_FLAT, *_DOTTED}))
    raise UnsupportedError(f"Stable Diffusion 1 adapters have no spelling {format_name!r}; known: {known}.")


def _with_text(prefixes: Mapping[str, str], extra: str) -> dict[str, str]:
    return {part: prefix + (extra if part == "text_encoder" else "") for part, prefix in prefixes.items()}
