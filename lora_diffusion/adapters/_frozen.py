"""The weight below an adapter, whatever it is stored as."""

from __future__ import annotations

from torch import Tensor, nn

from lora_diffusion.adapters._peft import dequantize_bnb_weight, get_bnb_param_type


def frozen_weight(base: nn.Module) -> Tensor:
    """Returns the weight of a linear layer or a convolution: its own, or an upcast copy of a quantized one.

    Returns:
        [out, in] or [out, in, k, k], without gradient.
    """
    weight = base.get_parameter("weight").detach()
    if get_bnb_param_type(base.get_parameter("weight")):
        # Not dequantize_module_weight, which takes the scales away from an 8-bit layer on the CPU.
        weight = dequantize_bnb_weight(base.get_parameter("weight"), getattr(base, "state", None))
    if isinstance(base, nn.Conv2d):
        return weight.view(base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return weight
