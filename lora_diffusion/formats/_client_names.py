"""How programs call the tensors and modules of adapter files: data, and what tells one way from another."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_diffusion.core.types import ModuleKey

SUFFIXES: Mapping[str, tuple[str, str]] = {
    **{f".lora_{role}.weight": (role, "kohya") for role in ("down", "up", "mid")},
    **{f".hada_{role}": (role, "loha") for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{role}": (role, "lokr") for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{role}": (role, "full") for role in ("diff", "diff_b")},
    **{f".{role}": (role, "norm") for role in ("w_norm", "b_norm")},
    **{f".{role}.weight": (role, "glora") for role in ("a1", "a2", "b1", "b2")},
    **{f".{role}": (role, "oft") for role in ("oft_blocks", "rescale")},
    ".on_input": ("on_input", "ia3"),
    ".set_weight": ("set_weight", "set"),
    ".lora_A.weight": ("down", "peft"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_magnitude_vector": ("magnitude", ""),
    ".lora_magnitude_vector.weight": ("magnitude", ""),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora_linear_layer.down.weight": ("down", "linear_layer"),
    ".lora_linear_layer.up.weight": ("up", "linear_layer"),
    ".down.weight": ("down", "processor"),
    ".up.weight": ("up", "processor"),
    ".lora_A": ("down", "bare"),
    ".lora_B": ("up", "bare"),
    ".alpha": ("alpha", ""),
    ".dora_scale": ("dora_scale", ""),
    ".reshape_weight": ("reshape", ""),
    ".scale": ("scale", ""),
    ".weight": ("weight", "ia3"),
}
"""End of a tensor's name -> its role, and the style of naming (or the kind of adapter) that it belongs to."""
_NAMED = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")
"""PEFT's own names with the adapter's name in them, which it takes out before it saves."""


def split_role(name: str) -> tuple[str, str, str] | None:
    """Returns module, role and style of a tensor's name."""
    named = _NAMED.search(name)
    if named and not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name[: named.start()], {"A": "down", "B": "up"}[named[1]], "peft-named"
    for suffix, (role, style) in SUFFIXES.items():
        stem = name.removesuffix(suffix)
        if stem == name or (style == "processor" and not stem.endswith("_lora")) or (style == "ia3" and "." in stem):
            continue
        return stem, role, style
    return None


_CLIPS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
BEHIND_NORMS = {
    "norm1": "attn1.to_q",
    "norm2": "attn2.to_q",
    "norm3": "ff.net.0.proj",
    "norm": "proj_in",
    "in_layers.0": "in_layers.2",
    "out_layers.0": "out_layers.3",
}
"""Norm layer in ComfyUI's own names -> the layer behind it in the same block."""
NORM_OF = {
    "attn1.to_q": "norm1",
    "attn2.to_q": "norm2",
    "ff.net.0.proj": "norm3",
    "proj_in": "norm",
    "conv1": "norm1",
    "conv2": "norm2",
}
"""The same in diffusers' names, the other way around."""


def other_names(name: str) -> list[str]:
    """Returns names that other programs give to the same module: of attention of 2023, and of kohya's own OFT."""
    found = []
    if name.startswith("oft_unet_"):
        found.append(f"lora_unet_{name.removeprefix('oft_unet_')}")
    if ".processor.to_" in name and not name.endswith("_lora"):
        plain = name.replace(".processor.to_", ".to_")
        found.append(f"{plain}.0" if plain.endswith(".to_out") else plain)
    return found


def text_keys(name: str, family: str) -> list[ModuleKey]:
    """Returns the modules that ComfyUI's own name of one in a text encoder may mean, in old trees and in flat ones."""
    found = re.match(r"text_encoders\.(clip_[lhg])\.transformer\.(text_model\.)?", name)
    if not found or (found[1] == "clip_h") != (family == "sd2"):
        return []
    path = name[found.end() :]
    return [ModuleKey(_CLIPS[found[1]], f"{level}{path}") for level in ("text_model.", "")]


def _bare_spelling(name: str, key: ModuleKey) -> str:
    if key.part != "unet":
        return "bare text"
    return "processor" if ".processor." in name else "bare attention" if _is_attention(key) else "bare"


def spelling_of(name: str, key: ModuleKey | None) -> str:
    """Returns how a name is made: the prefix, and where it matters "ldm", "attention", "processor" or "short".

    Names without prefix are "bare", "bare attention", "processor" or "bare text".

    Short are the names of text encoders without `text_model`.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    if key is None or not prefix:
        return "unknown" if key is None else _bare_spelling(name, key)
    if key.part != "unet":
        if prefix == "text_encoder_2." and name.endswith("text_projection"):
            return f"{prefix} projection"
        return prefix if "text_model" in name or "text_projection" in name else f"{prefix} short"
    if prefix == "lora_unet_":
        return prefix if name == prefix + key.path.replace(".", "_") else f"{prefix} ldm"
    if prefix == "unet.":
        return f"{prefix} processor" if ".processor." in name else prefix + (" attention" if _is_attention(key) else "")
    return prefix


_FLAT_PREFIXES = ("lora_unet_", "oft_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
_DOTTED_PREFIXES = (
    "unet.",
    "text_encoders.",
    "text_encoder.",
    "text_encoder_2.",
    "diffusion_model.",
    "model.diffusion_model.",
)
_PREFIXES = (*_FLAT_PREFIXES, *_DOTTED_PREFIXES)


def _is_attention(key: ModuleKey) -> bool:
    return bool(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)$", key.path))
