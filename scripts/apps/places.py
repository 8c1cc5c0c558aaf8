"""How LDM-shaped programs call the modules of a base."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core.adapter_state import ModuleKey


def ldm_places(family: str, unet: Mapping[str, str]) -> dict[str, ModuleKey]:
    """Returns a program's module name -> module.

    Args:
        family: sd1 or sdxl.
        unet: parameter of diffusers -> parameter of LDM, as ComfyUI and Forge tabulate them.
    """
    places = {}
    for path, name in unet.items():
        if path.endswith(".weight"):
            module = name.removesuffix(".weight")
            places[f"diffusion_model.{module}"] = ModuleKey("unet", path.removesuffix(".weight"))
    for prefix, part in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2")):
        has_level = any(encoder.part == part and encoder.path_prefix for encoder in DIFFUSION[family].text_encoders)
        for name in _text_modules():
            bare = name if has_level or name == "text_projection" else name.removeprefix("text_model.")
            places[f"{prefix}.transformer.{name}"] = ModuleKey(part, bare)
    return places


def _text_modules() -> list[str]:
    layer = [*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"]
    layer += ["layer_norm1", "layer_norm2"]
    names = [f"text_model.encoder.layers.{index}.{name}" for index in range(32) for name in layer]
    embeddings = [f"text_model.embeddings.{name}_embedding" for name in ("token", "position")]
    return [*names, *embeddings, "text_model.final_layer_norm", "text_projection"]


def flat_ldm(places: Mapping[str, ModuleKey]) -> dict[str, ModuleKey]:
    """Returns the same with every "." made "_"."""
    return {re.sub(r"\.", "_", name): key for name, key in places.items()}
