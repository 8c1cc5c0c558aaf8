"""Adapters added into the frozen weights, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters._engines import engine_of
from lora_diffusion.adapters.switch import PeftSwitch, switch_of
from lora_diffusion.core.delta import delta_norm as delta_norm
from lora_diffusion.core.delta import delta_weight as delta_weight
from lora_diffusion.core.errors import RunError, UnsupportedError
from lora_diffusion.core.types import Loaded, ModuleAdapter, ModuleKey


def merge(loaded: Loaded, weights: Mapping[str, float]) -> None:
    """Adds the weighted adapters into the frozen weights: summed in float32, cast once.

    The change of each is that to the frozen weight alone, as it is unmerged.

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
    active = {name: weight for name, weight in switch.weights.items() if weight}
    changes: dict[ModuleKey, list[tuple[Any, str]]] = {}
    for key, layer in switch.layers():
        changes.setdefault(key, []).extend((layer, name) for name in active if name in layer.r)
    for key, own in changes.items():
        if own:
            weight = own[0][0].get_base_layer().weight
            switch.originals[key] = weight.data
            wide = weight.data.float()
            total = sum((active[name] * _live_delta(layer, name, wide) for layer, name in own), start=wide)
            weight.data = total.to(weight.dtype)
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


def _live_delta(layer: Any, name: str, weight: Tensor) -> Tensor:
    engine = engine_of(layer)
    variant, alpha = engine.describe(layer, name)
    with torch.no_grad():
        return delta_weight(ModuleAdapter(variant, engine.parameters(layer, name), alpha), weight)
