"""How files name the modules of the Stable Diffusion families (data, and one function over it)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, dotted_key_map
from lora_diffusion.core.types import ModuleKey
from lora_diffusion.families import _ldm

_FLAT = {
    "sd1": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sd2": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
"""Family -> part -> prefix in kohya's files."""
_LDM_UNET_IN_KOHYA = frozenset({"sdxl"})
_DOTTED = ("diffusers", "peft")


def key_map(format_name: str, parts: Mapping[str, nn.Module], family: str = "sd1") -> KeyMap:
    """Maps every linear and convolution layer of the parts to its name in a file.

    transformers 5.6 flattened CLIPTextModel: its paths begin with "encoder.", while files of every client say
    "text_model.encoder.". PEFT folders are loaded on the live model and keep the live path.

    Args:
        format_name: kohya, diffusers or peft; ldm is that of base checkpoints, see `_ldm`.
        parts: part -> network; the meta device is enough.
        family: which prefixes and block names.

    Raises:
        UnsupportedError: the format has no names for this family.
    """
    paths = {
        part: [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for part, network in parts.items()
    }
    if format_name == "ldm":
        return KeyMap(_ldm_pairs(paths, family))
    if format_name == "kohya":
        return KeyMap(_kohya_pairs(paths, family))
    if format_name in _DOTTED:
        extra = {part: "text_model." if format_name != "peft" and _is_flat(own) else "" for part, own in paths.items()}
        return dotted_key_map(paths, {part: f"{part}.{extra[part]}" for part in paths})
    known = ", ".join(sorted({"kohya", *_DOTTED}))
    raise UnsupportedError(f"Stable Diffusion adapters have no spelling {format_name!r}; known: {known}.")


def _ldm_pairs(paths: Mapping[str, list[str]], family: str) -> list[tuple[ModuleKey, str]]:
    pairs = [(ModuleKey("unet", path), _ldm.UNET + name) for path, name in _ldm.unet_names(paths["unet"]).items()]
    towers = _ldm.TOWERS[family]
    return pairs + [(ModuleKey(part, path), name(path)) for part, name in towers.items() for path in paths[part]]


def _kohya_pairs(paths: Mapping[str, list[str]], family: str) -> list[tuple[ModuleKey, str]]:
    pairs = []
    for part, own in paths.items():
        names = _ldm.unet_names(own) if part == "unet" and family in _LDM_UNET_IN_KOHYA else {}
        extra = "text_model." if _is_flat(own) else ""
        prefix = _FLAT[family][part]
        pairs += [(ModuleKey(part, path), prefix + (extra + names.get(path, path)).replace(".", "_")) for path in own]
    return pairs


def _is_flat(paths: list[str]) -> bool:
    """Says whether these are paths of a text tower without `text_model`."""
    return not any(path.startswith("text_model.") for path in paths) and any(
        path.startswith("encoder.") for path in paths
    )
