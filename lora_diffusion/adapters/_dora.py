"""DoRA in PEFT's layers, with the magnitude along the inputs or along the outputs of the weight.

PEFT's own has the second only. On the first ComfyUI, Forge and A1111 agree, and what is computed here is what they
compute from the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_diffusion.adapters._frozen import frozen_weight
from lora_diffusion.adapters._peft import LoraVariant
from lora_diffusion.core.delta import AXES, norms
from lora_diffusion.core.types import ModuleAdapter


class Magnitude(nn.Module):
    """The trained length of each column or row, with the scale of the factors beside it."""

    def __init__(self, weight: nn.Parameter, adapter: ModuleAdapter) -> None:
        """Holds them; `weight` is [1, in, (1, 1)] or [out, 1, (1, 1)]."""
        super().__init__()
        self.weight = weight
        self.alpha, self.scale = adapter.alpha, adapter.scale


class Dora(LoraVariant):  # type: ignore[misc]  # PEFT is untyped
    """Adds strength * (gain * (W + scale * up @ down) - W) x to the answer of the base.

    The gain is magnitude / |W + scale * up @ down|; like in the paper (section 4.3) no gradient goes through the norm.
    """

    def __init__(self, variant: str) -> None:
        """Takes dora or dora_out."""
        self.variant = variant
        self.axis = AXES[variant]

    def forward(  # type: ignore[override]  # PEFT calls it on the object
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **unused: Any
    ) -> Tensor:
        """Returns the answer with the change.

        Args:
            module: PEFT's layer.
            active_adapter: name of the adapter.
            x: input of the layer, in the number type of the factors.
            result: answer of the base, and of the adapters before this one.
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
        answer: Tensor = result + module.scaling[active_adapter] * change
        return answer

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
