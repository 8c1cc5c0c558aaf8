"""The arithmetic of LoRA while it is trained, for whatever holds its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_diffusion.runtime.bf16_emulation import product_dtype


class TrainingDropout(nn.Dropout):
    """Dropout wherever a gradient is recorded: the frozen base stays in eval mode, and previews need all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, with a share of its values 0 and the others scaled up while a gradient is recorded."""
        return functional.dropout(x, self.p, training=torch.is_grad_enabled())


class FusedProduct(torch.autograd.Function):
    """base(x) + up @ (scale * down @ x), with x kept once for the backward pass."""

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
        """Gives the gradients of the input, of the two factors, and of nothing else."""
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
