"""A tiny base as the adapters room sees it, and adapters of all kinds of module for it."""

from __future__ import annotations

import torch
from torch import nn

from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import BaseInfo, Loaded, Part
from lora_diffusion.core.keymap import KeyMap, dotted_key_map, flat_key_map
from tests.tiny import tiny_pipeline

PARTS = {
    "unet": Part(
        {
            "attn": (r".*\.attn[12]\.to_(q|k|v|out\.0)",),
            "ff": (r".*\.ff\.net\.(0\.proj|2)",),
            "conv": (
                r".*\.resnets\.\d+\.conv(1|2|_shortcut)",
                r".*\.proj_(in|out)",
                r".*\.(down|up)samplers\.\d+\.conv",
            ),
        }
    ),
    "text_encoder": Part({"attn": (r".*\.self_attn\.(q|k|v|out)_proj",), "ff": (r".*\.mlp\.fc[12]",)}),
}


def tiny_loaded(seed: int = 0) -> Loaded:
    """Returns frozen networks of the tiny pipeline."""
    pipeline = tiny_pipeline(seed)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    for network in parts.values():
        network.requires_grad_(False)
    info = BaseInfo(16, 2, "stable-diffusion-v1", "epsilon", "tiny")
    return Loaded(parts, {}, None, torch.device("cpu"), info)


def random_state(
    loaded: Loaded, seed: int = 0, rank: int = 4, alpha: float = 2.0, groups: str = "attn ff conv"
) -> AdapterState:
    """Returns an adapter with random factors for every module of the groups in both parts."""
    import re

    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for part, network in loaded.parts.items():
        patterns = [pattern for group in groups.split() for pattern in PARTS[part].groups.get(group, ())]
        for path, module in network.named_modules():
            if any(re.fullmatch(pattern, path) for pattern in patterns):
                modules[ModuleKey(part, path)] = _random_adapter(module, rank, alpha, generator)
    return AdapterState(modules)


def _random_adapter(module: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> ModuleAdapter:
    weight = module.get_parameter("weight")
    ones = (1, 1) if weight.dim() == 4 else ()
    down = 0.1 * torch.randn((rank, *weight.shape[1:]), generator=generator)
    up = 0.1 * torch.randn((weight.shape[0], rank, *ones), generator=generator)
    return ModuleAdapter("lora", {"down": down, "up": up}, alpha)


def answers(loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what UNet and text encoder make of fixed inputs."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    ids = torch.randint(0, 200, (2, 7), generator=generator)
    with torch.no_grad():
        picture = loaded.parts["unet"](latents, torch.tensor([3, 600]), text).sample
        return picture, loaded.parts["text_encoder"](ids).last_hidden_state


def key_map(format_name: str, loaded: Loaded) -> KeyMap:
    """Returns the names of all linear and convolution layers; the text encoder's always hold text_model."""
    paths = {
        part: [path for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for part, network in loaded.parts.items()
    }
    if format_name == "kohya":
        return flat_key_map(paths, {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"})
    extra = "text_model." if format_name == "diffusers" else ""
    return dotted_key_map(paths, {"unet": "unet.", "text_encoder": f"text_encoder.{extra}"})


def same(first: AdapterState, second: AdapterState) -> bool:
    """Says whether two adapters are equal bit for bit, metadata aside."""
    return first.modules.keys() == second.modules.keys() and all(
        adapter.alpha == second.modules[key].alpha
        and all(torch.equal(tensor, second.modules[key].tensors[name]) for name, tensor in adapter.tensors.items())
        for key, adapter in first
    )
