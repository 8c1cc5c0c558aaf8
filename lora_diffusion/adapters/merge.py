"""Adapters added into the frozen weights, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.switch import PeftSwitch, switch_of
from lora_diffusion.core import lowrank
from lora_diffusion.core.errors import AdapterFileError, RunError, UnsupportedError
from lora_diffusion.core.types import Loaded, ModuleAdapter


def delta_weight(adapter: ModuleAdapter) -> Tensor:
    """Weight change of one LoRA layer, (alpha / rank) * up @ down.

    Args:
        adapter: down [rank, in] or [rank, in, k, k] and up [out, rank] or [out, rank, 1, 1] on one device.

    Returns:
        [out, in] or [out, in, k, k], always float32 so that several changes can be summed before one cast.

    Raises:
        AdapterFileError: down and up disagree on the rank.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.

    >>> delta_weight(ModuleAdapter("lora", {"down": torch.ones(2, 3), "up": torch.ones(1, 2)}, alpha=1.0))
    tensor([[1., 1., 1.]])
    """
    down, up = adapter.tensors["down"].float(), adapter.tensors["up"].float()
    if up.shape[1] != down.shape[0]:
        raise AdapterFileError(f"down has rank {down.shape[0]} and up has rank {up.shape[1]}; the file is damaged.")
    change = (adapter.alpha / adapter.rank) * (up.flatten(1) @ down.flatten(1))
    return change.reshape(up.shape[0], *down.shape[1:])


def delta_norm(adapter: ModuleAdapter) -> float:
    """Returns the Frobenius norm of `delta_weight` without computing it."""
    return lowrank.delta_norm(adapter.tensors["down"], adapter.tensors["up"], adapter.alpha / adapter.rank)


def merge(loaded: Loaded, weights: Mapping[str, float]) -> None:
    """Adds the weighted adapters into the frozen weights: summed in float32, cast once.

    Until `unmerge` the frozen weights are in memory twice, and the adapters' weights cannot be set.

    Raises:
        ConfigError: no adapter of a name in `weights`.
        RunError: adapters are merged already.
        UnsupportedError: the base is quantized.
    """
    switch = switch_of(loaded)
    if switch.originals:
        raise RunError("Adapters are merged already; unmerge first.")
    for key, layer in switch.layers():
        if type(layer.get_base_layer()) not in (nn.Linear, nn.Conv2d):
            raise UnsupportedError(
                f"{key.part}/{key.path} is quantized, and merging would round the adapter away; load the base with "
                "model.quantization=none."
            )
    switch.set_weights(weights)
    for key, layer in switch.layers():
        active = [name for name in layer.active_adapters if name in layer.r]
        if active:
            weight = layer.get_base_layer().weight
            switch.originals[key] = weight.data
            change = sum((_live_delta(layer, name) for name in active), start=weight.data.float())
            weight.data = change.to(weight.dtype)
    switch.apply({})


def unmerge(loaded: Loaded) -> None:
    """Puts the frozen weights of before `merge` back, bit for bit, and the adapters to the weights they had in it."""
    switch = switch_of(loaded)
    for key, layer in switch.layers():
        if key in switch.originals:
            layer.get_base_layer().weight.data = switch.originals[key]
    switch.originals.clear()
    switch.set_weights(switch.weights)


def remove(loaded: Loaded) -> None:
    """Takes all adapters out; weights that were merged stay merged, and the base has its own module names again."""
    switch = loaded.adapters
    if isinstance(switch, PeftSwitch):
        for key, layer in list(switch.layers()):
            loaded.parts[key.part].set_submodule(key.path, layer.get_base_layer())
    loaded.adapters = None


def _live_delta(layer: Any, name: str) -> Tensor:
    with torch.no_grad():
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        # layer.scaling is weight * alpha / rank
        return delta_weight(ModuleAdapter("lora", {"down": down, "up": up}, layer.scaling[name] * layer.r[name]))
