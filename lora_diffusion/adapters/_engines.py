"""How PEFT holds each kind of adapter: which layer, which config, and where in the layer each tensor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lora_diffusion.adapters._dora import Dora, Magnitude
from lora_diffusion.adapters._fused import FusedLinear
from lora_diffusion.adapters._peft import (
    LoHaConfig,
    LoHaLayer,
    LoKrConfig,
    LoKrLayer,
    LoraConfig,
    LoraLayer,
    PeftConfig,
)
from lora_diffusion.adapters._product import TrainingDropout
from lora_diffusion.core.types import ModuleAdapter


class Engine(ABC):
    """One kind of PEFT layer. A layer holds any number of adapters by name, each with rank, alpha and tensors."""

    layer: type[Any]
    tensors: Mapping[str, str]
    """Tensor name in a ModuleAdapter -> attribute of the layer."""

    @abstractmethod
    def config(self, rank: int, alpha: float, common: Mapping[str, Any], *, is_plain: bool) -> PeftConfig:
        """Returns what makes PEFT build the layers; `is_plain` if all of them are Linear or Conv2d of torch."""

    @abstractmethod
    def fill(self, layer: Any, name: str, adapter: ModuleAdapter, dropout: float) -> None:
        """Gives a layer the tensors of an adapter, frozen, in place of those that PEFT made."""

    @abstractmethod
    def describe(self, layer: Any, name: str) -> tuple[str, float]:
        """Returns variant and alpha of an adapter in a layer."""

    def parameters(self, layer: Any, name: str) -> dict[str, nn.Parameter]:
        """Returns the parameters of an adapter in a layer, by tensor name."""
        held = {tensor: getattr(layer, attribute) for tensor, attribute in self.tensors.items()}
        return {
            tensor: own[name] if isinstance(own, nn.ParameterDict) else own[name].weight
            for tensor, own in held.items()
            if name in own
        }


class _Lora(Engine):
    layer = LoraLayer
    tensors = {"down": "lora_A", "up": "lora_B", "magnitude": "lora_magnitude_vector"}  # noqa: RUF012

    def config(self, rank: int, alpha: float, common: Mapping[str, Any], *, is_plain: bool) -> PeftConfig:
        config = LoraConfig(r=rank, lora_alpha=alpha, **common)  # type: ignore[arg-type]  # annotated int, any number
        if is_plain:
            config._register_custom_module({nn.Linear: FusedLinear})
        return config

    def fill(self, layer: Any, name: str, adapter: ModuleAdapter, dropout: float) -> None:
        for tensor in ("down", "up"):
            holder = getattr(layer, self.tensors[tensor])[name]
            holder.weight = _frozen(adapter.tensors[tensor].reshape(holder.weight.shape))
        if dropout:
            layer.lora_dropout[name] = TrainingDropout(dropout)
        if "magnitude" in adapter.tensors:
            layer.lora_variant[name] = Dora(adapter.variant)
            layer.lora_magnitude_vector[name] = Magnitude(_frozen(adapter.tensors["magnitude"]), adapter)
            # What PEFT calls scaling is then the strength of the whole change.
            layer.lora_alpha[name] = layer.r[name]

    def describe(self, layer: Any, name: str) -> tuple[str, float]:
        if name in layer.lora_variant:
            return layer.lora_variant[name].variant, layer.lora_magnitude_vector[name].alpha
        return "lora", float(layer.lora_alpha[name])


class _Lycoris(Engine):
    variant: str

    def fill(self, layer: Any, name: str, adapter: ModuleAdapter, dropout: float) -> None:
        assert not dropout, f"{self.variant} has no dropout"
        for tensor, attribute in self.tensors.items():
            held = getattr(layer, attribute)
            if name in held:
                del held[name]
            if tensor in adapter.tensors:
                held[name] = _frozen(adapter.tensors[tensor])
        # Two whole factors of lokr have no rank to divide alpha by, but PEFT always divides.
        layer.r[name] = adapter.rank
        layer.alpha[name] = adapter.scale * adapter.rank

    def describe(self, layer: Any, name: str) -> tuple[str, float]:
        return self.variant, float(layer.alpha[name])


class _LoHa(_Lycoris):
    layer, variant = LoHaLayer, "loha"
    tensors = {name: f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")}  # noqa: RUF012

    def config(self, rank: int, alpha: float, common: Mapping[str, Any], *, is_plain: bool) -> PeftConfig:
        del is_plain
        return LoHaConfig(r=rank, alpha=alpha, **common)  # type: ignore[arg-type]


class _LoKr(_Lycoris):
    layer, variant = LoKrLayer, "lokr"
    tensors = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}  # noqa: RUF012

    def config(self, rank: int, alpha: float, common: Mapping[str, Any], *, is_plain: bool) -> PeftConfig:
        del is_plain
        return LoKrConfig(r=rank, alpha=alpha, **common)  # type: ignore[arg-type]


ENGINES: Mapping[str, Engine] = {
    **dict.fromkeys(("lora", "dora", "dora_out"), _Lora()),
    "loha": _LoHa(),
    "lokr": _LoKr(),
}
"""`ModuleAdapter.variant` -> its engine."""
LAYERS = (LoraLayer, LoHaLayer, LoKrLayer)
"""All kinds of layer that can stand where a module of the base was."""


def engine_of(layer: Any) -> Engine:
    """Returns the engine of a layer of PEFT."""
    return next(engine for engine in ENGINES.values() if isinstance(layer, engine.layer))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
