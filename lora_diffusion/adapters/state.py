"""Adapters as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.inject import Size, add_adapter
from lora_diffusion.adapters.switch import PeftSwitch
from lora_diffusion.core.errors import AdapterFileError, RunError
from lora_diffusion.core.types import AdapterState, Loaded, ModuleAdapter, ModuleKey


def read_state(loaded: Loaded, name: str = "default") -> AdapterState:
    """Copies an adapter out of the base: float32 on the CPU, whatever its weight is now.

    Raises:
        RunError: the base carries no adapter of that name.
    """
    switch = loaded.adapters
    if not isinstance(switch, PeftSwitch) or name not in switch.variants:
        raise RunError(f'The base carries no adapter "{name}".')
    variant = switch.variants[name]
    return AdapterState(
        {
            key: ModuleAdapter(
                variant.name,
                {tensor: _copied(getattr(layer, own)[name].weight) for tensor, own in variant.tensors.items()},
                float(layer.lora_alpha[name]),
            )
            for key, layer in switch.layers()
            if name in layer.r
        }
    )


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
    """
    check_fit(state, loaded.parts, f'The adapter "{name}"')

    def fill(key: ModuleKey, tensor: str, shape: torch.Size) -> Tensor:
        return state.modules[key].tensors[tensor].detach().to(torch.float32, copy=True).reshape(shape)

    sizes = {key: Size(adapter.rank, adapter.alpha) for key, adapter in state}
    add_adapter(loaded, sizes, variants.find(next(iter(state.modules.values())).variant), name, fill, weight=weight)


def check_fit(state: AdapterState, parts: Mapping[str, nn.Module], source: str) -> None:
    """Checks that every module of an adapter is there and has its shape.

    Args:
        state: the adapter.
        parts: part -> network; the meta device is enough, so this needs no weights.
        source: names the adapter in messages.

    Raises:
        AdapterFileError: it is empty, mixes kinds, or does not fit; lists up to ten modules.
    """
    kinds = {adapter.variant for _, adapter in state}
    if len(kinds) != 1:
        raise AdapterFileError(f"{source} holds {len(kinds)} kinds of adapter, but must hold one.")
    faults = [fault for key, adapter in state if (fault := _misfit(parts, key, adapter))]
    if faults:
        raise AdapterFileError(
            f"{source} does not fit this base: {len(faults)} of its {len(state.modules)} modules are missing or of "
            "another shape. Load it with the base it was trained on.",
            faults[:10],
        )


def _copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _misfit(parts: Mapping[str, nn.Module], key: ModuleKey, adapter: ModuleAdapter) -> str | None:
    network = parts.get(key.part)
    if network is None:
        return f"{key.part}/{key.path}: the base has no part {key.part}"
    try:
        module = network.get_submodule(key.path)
    except AttributeError:
        return f"{key.part}/{key.path}: no such module"
    expected = _expected_shapes(module, adapter.rank)
    if expected is None:
        return f"{key.part}/{key.path}: a {type(module).__name__} cannot hold an adapter"
    for tensor, shape in expected.items():
        own = tuple(adapter.tensors[tensor].shape)
        if _bare(own) != _bare(shape):
            return f"{key.part}/{key.path}: {tensor} is {list(own)}, the base needs {list(shape)}"
    return None


def _expected_shapes(module: nn.Module, rank: int) -> dict[str, tuple[int, ...]] | None:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, nn.Linear):
        return {"down": (rank, base.in_features), "up": (base.out_features, rank)}
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        return {"down": (rank, base.in_channels, *base.kernel_size), "up": (base.out_channels, rank, 1, 1)}
    return None


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    # Some tools write the factors of a 1x1 convolution with two dimensions, or those of a linear layer with four.
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
