"""Adapters as plain data, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_diffusion.adapters import variants
from lora_diffusion.adapters._engines import ENGINES, LAYERS, engine_of
from lora_diffusion.adapters.inject import Slot, add_adapter
from lora_diffusion.adapters.switch import PeftSwitch
from lora_diffusion.algebra.delta import fits, without_tucker
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import AdapterFileError, RunError, UnsupportedError


def read_state(loaded: Loaded, name: str = "default") -> AdapterState:
    """Copies an adapter out of the base: float32 on the CPU, whatever its weight is now.

    Raises:
        RunError: the base carries no adapter of that name.
    """
    switch = loaded.adapters
    if not isinstance(switch, PeftSwitch) or name not in switch.weights:
        raise RunError(f'The base carries no adapter "{name}".')
    return AdapterState({key: _read_module(layer, name) for key, layer in switch.layers() if name in layer.r})


def _read_module(layer: Any, name: str) -> ModuleAdapter:
    engine = engine_of(layer)
    variant, alpha = engine.describe(layer, name)
    parameters = engine.parameters(layer, name)
    copies = {
        tensor: parameter.detach().to("cpu", torch.float32, copy=True) for tensor, parameter in parameters.items()
    }
    return ModuleAdapter(variant, copies, alpha)


def load_state(loaded: Loaded, state: AdapterState, name: str, weight: float = 1.0) -> None:
    """Adds an adapter from plain data to the modules it names, frozen, each with its own rank and alpha.

    Args:
        loaded: its networks are changed in place; adapters that it carries stay as they are.
        state: copied.
        name: for `loaded.adapters.set_weights`.
        weight: strength of the adapter.

    Raises:
        AdapterFileError: the base lacks a module or has it in another shape; lists up to ten.
        ConfigError: the name is taken.
        UnsupportedError: a variant that does not run on quantized layers, and the base has such.
    """
    _check_variants(state, name)
    check_fit(state, loaded.parts, f'The adapter "{name}"')
    _check_quantization(state, getattr(loaded.options, "quantization", "none"), name)

    def make(key: ModuleKey, base: Any) -> ModuleAdapter:
        del base
        plain = without_tucker(state.modules[key])
        copies = {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in plain.tensors.items()}
        return replace(plain, tensors=copies)

    slots = {key: Slot(adapter.variant, adapter.rank, adapter.alpha) for key, adapter in state}
    add_adapter(loaded, slots, name, make, weight=weight)


def _check_variants(state: AdapterState, name: str) -> None:
    unfit = {adapter.variant for _, adapter in state if adapter.variant not in ENGINES}
    unfit |= {"changes of biases" for _, adapter in state if "bias" in adapter.tensors}
    if unfit:
        raise UnsupportedError(
            f'The adapter "{name}" holds {", ".join(sorted(unfit))}, which cannot be switched on and off beside a '
            "base; merge it into the base: lora-diffusion merge."
        )


def _check_quantization(state: AdapterState, quantization: str, name: str) -> None:
    stored = {adapter.variant for _, adapter in state}
    unable = [
        each.stored for each in variants.every() if each.stored in stored and quantization not in each.quantizations
    ]
    if unable:
        raise UnsupportedError(
            f'The adapter "{name}": {" and ".join(unable)} cannot run on a {quantization} base; set '
            "model.quantization=none, or merge it into the base: lora-diffusion merge."
        )


def check_fit(state: AdapterState, parts: Mapping[str, nn.Module], source: str) -> None:
    """Checks that every module of an adapter is there and has its shape.

    Args:
        state: the adapter.
        parts: part -> network; the meta device is enough, so this needs no weights.
        source: names the adapter in messages.

    Raises:
        AdapterFileError: it is empty or does not fit; lists up to ten modules.
    """
    if not state.modules:
        raise AdapterFileError(f"{source} holds no adapter.")
    errors = [error for key, adapter in state if (error := _misfit(parts, key, adapter))]
    if errors:
        raise AdapterFileError(
            f"{source} does not fit this base: {len(errors)} of its {len(state.modules)} modules are missing or of "
            "another shape. Load it with the base it was trained on.",
            errors[:10],
        )


def weight_shapes(parts: Mapping[str, nn.Module]) -> dict[ModuleKey, tuple[int, ...]]:
    """Returns the weight shapes of all layers that adapters of any variant change; the meta device is enough."""
    from torch import nn

    layer_types = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding
    return {
        ModuleKey(part, path): tuple(module.get_parameter("weight").shape)
        for part, network in parts.items()
        for path, module in network.named_modules()
        if isinstance(module, layer_types)
    }


def _misfit(parts: Mapping[str, nn.Module], key: ModuleKey, adapter: ModuleAdapter) -> str | None:
    network = parts.get(key.part)
    if network is None:
        return f"{key.part}/{key.path}: the base has no part {key.part}"
    try:
        module = network.get_submodule(key.path)
    except AttributeError:
        return f"{key.part}/{key.path}: no such module"
    base = module.get_base_layer() if isinstance(module, LAYERS) else module
    shape = _shape(base, adapter)
    if shape is None:
        return f"{key.part}/{key.path}: a {type(base).__name__} cannot hold {adapter.variant}"
    if "bias" in adapter.tensors and getattr(base, "bias", None) is None:
        return f"{key.part}/{key.path}: a bias is changed, and the base has none"
    error = _wrong_factor(adapter, shape) or _wrong_change(adapter, shape)
    return error and f"{key.part}/{key.path}: {error}"


def _shape(base: nn.Module, adapter: ModuleAdapter) -> tuple[int, ...] | None:
    """Returns the shape of a layer's weight; None if layers of its type cannot hold the adapter."""
    # A quantized weight is stored in another shape.
    if isinstance(base, nn.Linear):
        return (base.out_features, base.in_features)
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        return (base.out_channels, base.in_channels, *base.kernel_size)
    if isinstance(base, nn.Embedding) and adapter.variant in ("lora", "full", "set"):
        return (base.num_embeddings, base.embedding_dim)
    is_norm = isinstance(base, nn.GroupNorm | nn.LayerNorm) and base.weight is not None
    return tuple(base.get_parameter("weight").shape) if is_norm and adapter.variant in ("full", "norm", "set") else None


def _wrong_factor(adapter: ModuleAdapter, shape: Sequence[int]) -> str | None:
    if "down" not in adapter.tensors or "mid" in adapter.tensors:
        return None
    expected = {"down": (adapter.rank, *shape[1:]), "up": (shape[0], adapter.rank, *(1,) * (len(shape) - 2))}
    for tensor, wanted in expected.items():
        actual = tuple(adapter.tensors[tensor].shape)
        # ComfyUI writes the factors of convolutions flat.
        if _bare(actual) != _bare(wanted) and actual != (wanted[0], math.prod(wanted[1:])):
            return f"{tensor} is {list(actual)}, the base needs {list(wanted)}"
    return None


def _wrong_change(adapter: ModuleAdapter, shape: tuple[int, ...]) -> str | None:
    try:
        if fits(adapter, shape):
            return None
        plain = {name: tensor for name, tensor in adapter.tensors.items() if name != "magnitude"}
        if len(plain) < len(adapter.tensors) and fits(replace(adapter, tensors=plain), shape):
            return f"magnitude is {list(adapter.tensors['magnitude'].shape)}, the base has {list(shape)}"
    except AdapterFileError as error:
        return str(error)
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in adapter.tensors.items())
    return f"its change is of another size than the base's {list(shape)}: {sizes}"


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    # Some tools write the factors of a 1x1 convolution with two dimensions, or those of a linear layer with four.
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
