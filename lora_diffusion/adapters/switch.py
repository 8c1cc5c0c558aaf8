"""Turns injected adapters up, down and off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lora_diffusion.adapters._engines import LAYERS
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.core.text import suggestion

_WRAPPED = ".base_layer"


class PeftSwitch:
    """All adapters of one base; stands in `Loaded.adapters`."""

    def __init__(self, loaded: Loaded) -> None:
        """Knows no adapter yet."""
        self._loaded = loaded
        self.weights: dict[str, float] = {}
        """Adapter name -> its weight now."""
        self.originals: dict[ModuleKey, nn.Module] = {}
        """Frozen layers as they were before `merge`; empty when nothing is merged."""

    def layers(self) -> Iterator[tuple[ModuleKey, Any]]:
        """Yields every layer of PEFT (which is untyped), in the order of the networks.

        Adapters of different variants on one module are layers around each other, which come one after the other
        with the same key, the outermost first.
        """
        for part, network in self._loaded.parts.items():
            for path, module in network.named_modules():
                if isinstance(module, LAYERS):
                    while path.endswith(_WRAPPED):
                        path = path.removesuffix(_WRAPPED)  # noqa: PLW2901
                    yield ModuleKey(part, path), module

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Sets each named adapter to its weight and every other one to 0; what is trained stays trained.

        Raises:
            ConfigError: no adapter of that name is loaded.
            RunError: adapters are merged.
        """
        for name in weights:
            if name not in self.weights:
                raise ConfigError(
                    f'There is no adapter "{name}" on this base{suggestion(name, self.weights)}. '
                    f"Loaded: {', '.join(self.weights) or 'none'}."
                )
        if self.originals:
            raise RunError("Adapters are merged into the base, so their weights cannot change; unmerge first.")
        self.weights = {name: float(weights.get(name, 0.0)) for name in self.weights}
        self.apply({name: weight for name, weight in self.weights.items() if weight})

    def apply(self, active: Mapping[str, float]) -> None:
        """Makes the layers compute with these adapters only, whatever `weights` says."""
        layers = [layer for _, layer in self.layers()]
        with _kept_gradient_flags(layers):
            for layer in layers:
                names = [name for name in active if name in layer.r]
                layer.set_adapter(names)
                for name in names:
                    layer.set_scale(name, active[name])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the context the base answers as if no adapter were there."""
        layers = [layer for _, layer in self.layers()]
        with _kept_gradient_flags(layers):
            for layer in layers:
                layer.enable_adapters(False)
        try:
            yield
        finally:
            with _kept_gradient_flags(layers):
                for layer in layers:
                    layer.enable_adapters(True)


def switch_of(loaded: Loaded) -> PeftSwitch:
    """Returns the switch of a base, made on first use."""
    if loaded.adapters is None:
        loaded.adapters = PeftSwitch(loaded)
    assert isinstance(loaded.adapters, PeftSwitch)
    return loaded.adapters


@contextmanager
def _kept_gradient_flags(layers: Sequence[Any]) -> Iterator[None]:
    # PEFT decides requires_grad again whenever an adapter is switched; only `inject` decides what is trained.
    flags = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
