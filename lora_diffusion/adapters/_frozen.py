"""The weight below an adapter, whatever it is stored as."""

from __future__ import annotations

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn


def frozen_weight(base: nn.Module) -> Tensor:
    """Returns the weight of a linear layer or a convolution: its own, or a widened copy of a quantized one.

    Returns:
        [out, in] or [out, in, k, k], without gradient.
    """
    weight: Tensor = dequantize_module_weight(base).detach()
    if isinstance(base, nn.Conv2d):
        return weight.view(base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return weight
