"""PEFT's linear layer with the arithmetic of training in fewer passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.adapters._peft import Linear
from lora_diffusion.adapters._product import FusedProduct


class FusedLinear(Linear):
    """Computes base(x) + up @ (scale * down @ x) with one trained adapter as PEFT does, and leaves all else to PEFT.

    PEFT casts x to the adapter's type, scales the whole output and adds it in a pass of its own; autograd then keeps
    a copy of x for each cast and sums two gradients of x. Here the scale is put on the small factor, both products
    are added by the matrix product itself, and x is kept once.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns [..., out] in the type of the base's answer."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        base = self.get_base_layer()
        # The base can be wrapped in a layer of another kind of adapter.
        if args or kwargs or len(active) != 1 or self.base_layer is not base or not self._is_plain(x, active[0]):
            return super().forward(x, *args, **kwargs)
        name = active[0]
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        tensors = (x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        answer: Tensor = FusedProduct.apply(*tensors, self.scaling[name], kind)
        return answer

    def _is_plain(self, x: Tensor, name: str) -> bool:
        active_dropout = isinstance(self.lora_dropout[name], nn.Dropout) and torch.is_grad_enabled()
        one_type = torch.is_autocast_enabled(x.device.type) or x.dtype == self.lora_A[name].weight.dtype
        special = self.disable_adapters or self.merged or self.lora_variant or active_dropout
        return one_type and x.dim() > 1 and not special
