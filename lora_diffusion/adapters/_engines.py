"""How PEFT holds each variant of adapter: which layer, which config, and where in the layer each tensor is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters._frozen import frozen_weight
from lora_diffusion.adapters._peft import (
    Linear,
    LoHaConfig,
    LoHaLayer,
    LoKrConfig,
    LoKrLayer,
    LoraConfig,
    LoraLayer,
    LoraVariant,
    PeftConfig,
)
from lora_diffusion.adapters.lora_arithmetic import FusedProduct, TrainingDropout
from lora_diffusion.algebra.delta import AXES, norms
from lora_diffusion.core.adapter_state import ModuleAdapter


class Magnitude(nn.Module):
    """The trained length of each column or row, with the scale of the factors beside it."""

    def __init__(self, weight: nn.Parameter, adapter: ModuleAdapter) -> None:
        """Holds them; `weight` is [1, in, (1, 1)] or [out, 1, (1, 1)]."""
        super().__init__()
        self.weight = weight
        self.alpha, self.scale = adapter.alpha, adapter.scale


class Dora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """Adds strength * (gain * (W + scale * up @ down) - W) x to the output of the base.

    The gain is magnitude / |W + scale * up @ down|; like in the paper (section 4.3) no gradient goes through the norm.
    """

    def __init__(self, variant: str) -> None:
        """Takes dora or dora_out."""
        self.variant = variant
        self.axis = AXES[variant]

    def forward(  # type: ignore[override]  # PEFT calls it on the object
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """Returns the output with the change, in the shape of `result`.

        Args:
            module: PEFT's layer.
            active_adapter: name of the adapter.
            x: [..., in], or [batch, in, height, width]: input of the layer, in the dtype of the factors.
            result: [..., out], or [batch, out, height, width]: output of the base, and of the adapters before this one.
            unused: options of other variants of PEFT.
        """
        del unused
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        magnitude, base = module.lora_magnitude_vector[active_adapter], module.get_base_layer()
        frozen = frozen_weight(base)
        gain = self._gain(magnitude, frozen, down.weight, up.weight)
        weight, dropped = frozen.to(x.dtype), module.lora_dropout[active_adapter](x)
        if self.axis == 1:
            change = _product(base, x * (gain - 1), weight) + magnitude.scale * up(down(dropped * gain))
        else:
            change = _product(base, x, weight) * (gain - 1) + magnitude.scale * up(down(dropped)) * gain
        output: Tensor = result + module.scaling[active_adapter] * change
        return output

    def _gain(self, magnitude: Magnitude, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Returns the gain in the shape that multiplies inputs or outputs of the layer: [size] or [1, size, 1, 1]."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
            length = norms(weight.float() + magnitude.scale * change, self.axis)
        gain = magnitude.weight / length
        return gain.flatten() if weight.dim() == 2 else gain.view(1, -1, 1, 1)


def _product(base: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Returns the base layer's product without its bias."""
    return base._conv_forward(x, weight, None) if isinstance(base, nn.Conv2d) else functional.linear(x, weight)


class FusedLinear(Linear):
    """Computes base(x) + up @ (scale * down @ x) with one trained adapter as PEFT does, and leaves all else to PEFT.

    PEFT casts x to the adapter's type, scales the whole output and adds it in a pass of its own; autograd then keeps
    a copy of x for each cast and sums two gradients of x. Here the scale is put on the small factor, both products
    are added by the matrix product itself, and x is kept once.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns [*, out] of [*, in], in the dtype of the base's output."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        # The base can be wrapped in a layer of another variant.
        if args or kwargs or len(active) != 1 or self.base_layer is not base or not self._is_plain(x, active[0]):
            return super().forward(x, *args, **kwargs)
        name = active[0]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        tensors = (x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        output: Tensor = FusedProduct.apply(*tensors, self.scaling[name], dtype)
        return output

    def _is_plain(self, x: Tensor, name: str) -> bool:
        active_dropout = isinstance(self.lora_dropout[name], nn.Dropout) and torch.is_grad_enabled()
        is_one_dtype = torch.is_autocast_enabled(x.device.type) or x.dtype == self.lora_A[name].weight.dtype
        special = self.disable_adapters or self.merged or self.lora_variant or active_dropout
        return is_one_dtype and x.dim() > 1 and not special


class Engine(ABC):
    """One class of PEFT layers. A layer holds any number of adapters by name, each with rank, alpha and tensors."""

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
        holders = {tensor: getattr(layer, attribute) for tensor, attribute in self.tensors.items()}
        return {
            tensor: holder[name] if isinstance(holder, nn.ParameterDict) else holder[name].weight
            for tensor, holder in holders.items()
            if name in holder
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
            holder = getattr(layer, attribute)
            if name in holder:
                del holder[name]
            if tensor in adapter.tensors:
                holder[name] = _frozen(adapter.tensors[tensor])
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
"""All classes of layers that can stand where a module of the base was."""


def engine_of(layer: Any) -> Engine:
    """Returns the engine of a layer of PEFT."""
    return next(engine for engine in ENGINES.values() if isinstance(layer, engine.layer))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
