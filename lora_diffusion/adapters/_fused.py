"""PEFT's linear layer with the arithmetic of training in fewer passes over the activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_diffusion.adapters._peft import Linear
from lora_diffusion.core.products import product_dtype


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
        answer: Tensor = _Fused.apply(*tensors, self.scaling[name], kind)
        return answer

    def _is_plain(self, x: Tensor, name: str) -> bool:
        active_dropout = isinstance(self.lora_dropout[name], nn.Dropout) and torch.is_grad_enabled()
        one_type = torch.is_autocast_enabled(x.device.type) or x.dtype == self.lora_A[name].weight.dtype
        special = self.disable_adapters or self.merged or self.lora_variant or active_dropout
        return one_type and x.dim() > 1 and not special


class TrainingDropout(nn.Dropout):
    """Dropout wherever a gradient is recorded: the frozen base stays in eval mode, and previews need all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, with a share of its values 0 and the others scaled up while a gradient is recorded."""
        return functional.dropout(x, self.p, training=torch.is_grad_enabled())


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """Answers in `dtype`, the type of the products under autocast."""
        wide = product_dtype(dtype, x.device)
        rows = x.to(dtype).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            wide_rows = rows.to(wide)
            small = (wide_rows @ down.to(wide).T).mul_(scale)
            answer = functional.linear(wide_rows, weight.to(wide), None if bias is None else bias.to(wide))
            answer = answer.addmm_(small, up.to(wide).T).to(dtype)
        ctx.save_for_backward(rows, small, weight, down, up)
        ctx.scale, ctx.shape, ctx.kind = scale, x.shape, x.dtype
        return answer.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, small, weight, down, up = ctx.saved_tensors
        wide = small.dtype
        gradient = gradients[0].flatten(0, -2).to(wide)
        small_gradient = (gradient @ up.to(wide)).mul_(ctx.scale)
        for_x = for_down = for_up = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ weight.to(wide)).addmm_(small_gradient, down.to(wide)).view(ctx.shape).to(ctx.kind)
        if ctx.needs_input_grad[3]:
            for_down = (small_gradient.T @ rows.to(wide)).float()
        if ctx.needs_input_grad[4]:
            for_up = (gradient.T @ small).float()
        return for_x, None, None, for_down, for_up, None, None
