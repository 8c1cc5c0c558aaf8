"""Puts adapters into a loaded base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lora_diffusion.adapters._engines import ENGINES, LAYERS, Engine
from lora_diffusion.adapters._frozen import frozen_weight
from lora_diffusion.adapters._peft import inject_adapter_in_model
from lora_diffusion.adapters.plan import InjectionPlan, PlannedModule
from lora_diffusion.adapters.switch import switch_of
from lora_diffusion.adapters.variants import FULL, Variant
from lora_diffusion.algebra.delta import AXES, norms
from lora_diffusion.core import rng
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError, RunError


class Slot(NamedTuple):
    """What a module gets."""

    variant: str
    """As in ModuleAdapter."""
    rank: int
    alpha: float
    dropout: float = 0.0


Make = Callable[[ModuleKey, Any], ModuleAdapter]
"""(module, the base layer under its adapters) -> adapter without Tucker cores, any device; called once per module."""


def inject(
    loaded: Loaded, plan: InjectionPlan, variant: Variant, dropout: float, seed: int, name: str = "default"
) -> dict[str, dict[str, nn.Parameter]]:
    """Adds a new, trainable adapter with weight 1 that changes nothing yet.

    Args:
        loaded: its networks are changed in place and `loaded.adapters` is set.
        plan: made from the same base and variant.
        variant: of all that is not trained in full.
        dropout: of all that is not trained in full; acts wherever a gradient is recorded, whether the network is in
            training mode or not.
        seed: decides the first values; those of a module depend on the seed and its name only.
        name: adapter name.

    Returns:
        part -> "<module path>.<tensor name>" -> parameter, float32 on the base's device. Nothing else of the parts
        requires a gradient.

    Raises:
        RunError: a planned module did not get its layer.
        ConfigError: the name is taken.
    """
    planned = {module.key: module for module in plan.modules}
    variants = {key: FULL if module.identity else variant for key, module in planned.items()}
    slots = {
        key: Slot(variants[key].stored, module.rank, module.alpha, 0.0 if module.identity else dropout)
        for key, module in planned.items()
    }

    def make(key: ModuleKey, base: Any) -> ModuleAdapter:
        return _new_adapter(planned[key], variants[key], base, seed)

    add_adapter(loaded, slots, name, make)
    for part in plan.part_sizes:
        loaded.parts[part].requires_grad_(False)
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in plan.part_sizes}
    for key, module in planned.items():
        engine = ENGINES[variants[key].stored]
        for tensor, parameter in engine.parameters(_layer(loaded, key, engine), name).items():
            if tensor != module.identity:
                parameter.requires_grad_(True)
                parameters[key.part][f"{key.path}.{tensor}"] = parameter
    return parameters


def add_adapter(
    loaded: Loaded,
    slots: Mapping[ModuleKey, Slot],
    name: str,
    make: Make,
    *,
    weight: float = 1.0,
) -> None:
    """Adds a frozen adapter of what `make` gives for each module; other adapters stay as they are."""
    switch = switch_of(loaded)
    if name in switch.weights:
        raise ConfigError(f'Two adapters are called "{name}"; give each its own name.')
    if any(key.part in loaded.encoders for key in slots):
        # What the encoders gave for prompts without this adapter.
        loaded.text_cache.clear()
    for part, engine in dict.fromkeys((key.part, ENGINES[slot.variant]) for key, slot in slots.items()):
        fitting = {key.path: slot for key, slot in slots.items() if (key.part, ENGINES[slot.variant]) == (part, engine)}
        _install(loaded.parts[part], fitting, engine, name)
    for key, slot in slots.items():
        engine = ENGINES[slot.variant]
        layer = _layer(loaded, key, engine)
        _check(layer, key, slot, name)
        base = layer.get_base_layer()
        adapter = make(key, base)
        tensors = {tensor: values.to(base.weight.device, torch.float32) for tensor, values in adapter.tensors.items()}
        engine.fill(layer, name, replace(adapter, tensors=tensors), slot.dropout)
    switch.weights[name] = 0.0
    switch.set_weights({**switch.weights, name: weight})


def _install(network: nn.Module, slots: Mapping[str, Slot], engine: Engine, name: str) -> None:
    """Lets PEFT wrap modules; the new tensors are on the meta device, so no random number is drawn."""
    rank = Counter(slot.rank for slot in slots.values()).most_common(1)[0][0]
    alpha = Counter(slot.alpha for slot in slots.values()).most_common(1)[0][0]
    common = {
        "target_modules": _either(slots),
        "rank_pattern": _pattern({path: slot.rank for path, slot in slots.items() if slot.rank != rank}),
        "alpha_pattern": _pattern({path: slot.alpha for path, slot in slots.items() if slot.alpha != alpha}),
    }
    is_plain = all(type(_base(network, path)) in (nn.Linear, nn.Conv2d) for path in slots)
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    with _without_others(network, slots, engine):
        config = engine.config(rank, alpha, common, is_plain=is_plain)
        inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
        for path in slots:
            network.get_submodule(path).train(network.training)
    # Left there, it makes PEFT warn at the next adapter and diffusers write it into saved models.
    del network.peft_config
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def _without_others(network: nn.Module, paths: Iterable[str], engine: Engine) -> Iterator[None]:
    """Takes the layers of other engines off while PEFT works, and puts them around what it made.

    PEFT's layer for LoRA on convolutions cannot be around another.
    """
    others = {path: layers for path in paths if (layers := _others(network, path, engine))}
    for path, layers in others.items():
        network.set_submodule(path, layers[-1].base_layer)
    yield
    for path, layers in others.items():
        layers[-1].base_layer = network.get_submodule(path)
        network.set_submodule(path, layers[0])


def _others(network: nn.Module, path: str, engine: Engine) -> list[Any]:
    """Returns the layers of other engines around a module, the outermost first, down to this engine or the base."""
    layers: list[Any] = []
    module: Any = network.get_submodule(path)
    while isinstance(module, LAYERS) and not isinstance(module, engine.layer):
        layers.append(module)
        module = module.base_layer
    return layers


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    # One expression for all modules of a value: PEFT tries every entry on every module.
    return {
        f"^{_either(path for path, each in values.items() if each == value)}": value for value in set(values.values())
    }


def _either(paths: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(path) for path in paths)})"


def _base(network: nn.Module, path: str) -> Any:
    module = network.get_submodule(path)
    return module.get_base_layer() if isinstance(module, LAYERS) else module


def _layer(loaded: Loaded, key: ModuleKey, engine: Engine) -> Any:
    network = loaded.parts[key.part]
    others = _others(network, key.path, engine)
    return others[-1].base_layer if others else network.get_submodule(key.path)


def _check(layer: Any, key: ModuleKey, slot: Slot, name: str) -> None:
    engine = ENGINES[slot.variant]
    if not isinstance(layer, engine.layer) or name not in layer.r:
        raise RunError(
            f"PEFT left {key.part}/{key.path} ({type(layer).__name__}) without an adapter. Please report this with "
            "the versions of peft, diffusers and transformers."
        )
    base = type(layer.get_base_layer())
    # PEFT has layers of its own for quantized linear layers; its layer for convolutions only calls them.
    if base.__module__.startswith("bitsandbytes") and type(layer).__name__ != base.__name__:
        raise RunError(
            f"PEFT gave {key.part}/{key.path}, which is a {base.__name__}, the layer for unquantized weights. The base "
            "must be loaded with its quantization flags set; set model.quantization=none to go on without."
        )
    if (layer.r[name], engine.describe(layer, name)[1]) != (slot.rank, slot.alpha):
        raise RunError(f"PEFT gave {key.part}/{key.path} another size than {slot}; please report this.")


def _new_adapter(module: PlannedModule, variant: Variant, base: Any, seed: int) -> ModuleAdapter:
    tensors = {
        tensor: variant.first_values(shape, rng.derive(seed, "adapter", *_names(module.key, tensor)))
        for tensor, shape in module.tensors.items()
        if tensor != "magnitude" and tensor not in variant.zeros
    }
    tensors |= {tensor: torch.zeros(shape) for tensor, shape in module.tensors.items() if tensor in variant.zeros}
    if "magnitude" in module.tensors:
        weight = frozen_weight(base).float()
        tensors["magnitude"] = norms(weight, AXES[variant.stored])
    return ModuleAdapter(variant.stored, tensors | module.fixed(), module.alpha)


def _names(key: ModuleKey, tensor: str) -> tuple[str, ...]:
    """Returns what the first values of a tensor depend on besides the seed."""
    # The name of the tensor came later: the values of "down" must stay what they were.
    return (key.part, key.path) if tensor == "down" else (key.part, key.path, tensor)
