"""Adapters of a network that exists by name only."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey

QUERY = ModuleKey("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
CONV = ModuleKey("unet", "mid_block.resnets.0.conv1")
TEXT = ModuleKey("text_encoder", "encoder.layers.0.self_attn.q_proj")
SHAPES = {QUERY: (24, 16), CONV: (12, 8, 3, 3), TEXT: (10, 20)}


def lora(
    seed: int,
    rank: int = 4,
    alpha: float = 3.0,
    metadata: Mapping[str, str] | None = None,
    keys: tuple[ModuleKey, ...] = tuple(SHAPES),
) -> AdapterState:
    """Returns a random lora."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    for key in keys:
        out, *inner = SHAPES[key]
        tensors = {
            "down": torch.randn(rank, *inner, generator=rng),
            "up": torch.randn(out, rank, *([1, 1] if len(inner) > 1 else []), generator=rng),
        }
        modules[key] = ModuleAdapter("lora", tensors, alpha)
    return AdapterState(modules, metadata or {})


def loha(seed: int, rank: int = 2, keys: tuple[ModuleKey, ...] = (QUERY, TEXT)) -> AdapterState:
    """Returns a random loha; of a convolution it does not tell the size of the kernel."""
    rng = torch.Generator().manual_seed(seed)
    modules = {}
    for key in keys:
        out, width = SHAPES[key][0], math.prod(SHAPES[key][1:])
        tensors = {
            f"w{n}_{side}": torch.randn(*((out, rank) if side == "a" else (rank, width)), generator=rng)
            for n in "12"
            for side in "ab"
        }
        modules[key] = ModuleAdapter("loha", tensors, 1.0)
    return AdapterState(modules)


def dense(state: AdapterState) -> dict[ModuleKey, Tensor]:
    """Returns the changes of all modules in float64."""
    exact = {
        key: ModuleAdapter(
            adapter.variant, {name: tensor.double() for name, tensor in adapter.tensors.items()}, adapter.alpha
        )
        for key, adapter in state
    }
    return {key: delta_weight(adapter).double() for key, adapter in exact.items()}
