"""Adapters added into the frozen weights, and taken out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters._engines import LAYERS, engine_of
from lora_diffusion.adapters._frozen import frozen_weight
from lora_diffusion.adapters.switch import PeftSwitch, switch_of
from lora_diffusion.algebra.delta import delta_norm as delta_norm
from lora_diffusion.algebra.delta import delta_weight as delta_weight
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import RunError


def merge(loaded: Loaded, weights: Mapping[str, float]) -> None:
    """Puts layers with the weighted adapters added into the place of the frozen ones: summed in float32, cast once.

    The change of each is that to the frozen weight alone, as it is unmerged. A quantized weight is upcast, since
    quantizing the sum would round the adapter away.

    Until `unmerge` the frozen weights are in memory twice, and the adapters' weights cannot be set.

    Raises:
        ConfigError: no adapter of a name in `weights`.
        RunError: adapters are merged already.
    """
    switch = switch_of(loaded)
    if switch.originals:
        raise RunError("Adapters are merged already; unmerge first.")
    switch.set_weights(weights)
    active = {name: weight for name, weight in switch.weights.items() if weight}
    changes: dict[ModuleKey, list[tuple[Any, str]]] = {}
    for key, layer in switch.layers():
        changes.setdefault(key, []).extend((layer, name) for name in active if name in layer.r)
    for key, layers in changes.items():
        if layers:
            base = layers[0][0].get_base_layer()
            frozen = frozen_weight(base).float()
            total = sum((active[name] * _live_delta(layer, name, frozen) for layer, name in layers), start=frozen)
            switch.originals[key] = base
            _set_base(layers[0][0], _with_weight(base, total.to(_plain_dtype(loaded.parts[key.part]))))
    switch.apply({})


def unmerge(loaded: Loaded) -> None:
    """Puts the frozen weights of before `merge` back, bit for bit, and the adapters to the weights they had in it."""
    switch = switch_of(loaded)
    for key, layer in switch.layers():
        if key in switch.originals:
            _set_base(layer, switch.originals[key])
    switch.originals.clear()
    switch.set_weights(switch.weights)


def remove(loaded: Loaded) -> None:
    """Takes all adapters out; weights that were merged stay merged, and the base has its own module names again."""
    switch = loaded.adapters
    if isinstance(switch, PeftSwitch):
        layers = list(switch.layers())
        if any(key.part in loaded.encoders for key, _ in layers):
            loaded.text_cache.clear()
        for key, layer in layers:
            loaded.parts[key.part].set_submodule(key.path, layer.get_base_layer())
    loaded.adapters = None


def _set_base(layer: Any, base: nn.Module) -> None:
    """Puts a module below a layer of PEFT and all those that stand between."""
    while isinstance(layer.base_layer, LAYERS):
        layer = layer.base_layer
    layer.base_layer = base


def _with_weight(base: Any, weight: Tensor) -> nn.Module:
    """Returns a plain layer of the same type with another weight, and the base's own bias."""
    if isinstance(base, nn.Conv2d):
        sizes = (base.in_channels, base.out_channels, base.kernel_size)
        settings = (base.stride, base.padding, base.dilation, base.groups, False, base.padding_mode)
        layer: Any = nn.Conv2d(*sizes, *settings, device="meta")  # type: ignore[arg-type]
    else:
        layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = base.bias
    return layer.train(base.training)  # type: ignore[no-any-return]


def _plain_dtype(network: nn.Module) -> torch.dtype:
    """Returns the dtype of the weights that are not quantized; those of the base come first."""
    return next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())


def _live_delta(layer: Any, name: str, weight: Tensor) -> Tensor:
    engine = engine_of(layer)
    variant, alpha = engine.describe(layer, name)
    with torch.no_grad():
        return delta_weight(ModuleAdapter(variant, engine.parameters(layer, name), alpha), weight)
