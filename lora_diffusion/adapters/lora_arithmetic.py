"""The arithmetic of LoRA while it is trained, for whatever holds its factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_diffusion.runtime.bf16_emulation import upcast_dtype


class TrainingDropout(nn.Dropout):
    """Dropout wherever a gradient is recorded: the frozen base stays in eval mode, and previews need all inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns x, of any shape, in which, while a gradient is recorded, a share of the values is 0."""
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
        """Returns [..., out] in `dtype`, that of matrix products under autocast.

        Args:
            ctx: keeps what the backward pass needs.
            x: [..., in].
            weight: [out, in], frozen.
            bias: [out].
            down: [rank, in].
            up: [out, rank].
            scale: alpha / rank.
            dtype: of the output.
        """
        upcast = upcast_dtype(dtype, x.device)
        rows = x.to(dtype).flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):
            upcast_rows = rows.to(upcast)
            small = (upcast_rows @ down.to(upcast).T).mul_(scale)
            output = functional.linear(upcast_rows, weight.to(upcast), None if bias is None else bias.to(upcast))
            output = output.addmm_(small, up.to(upcast).T).to(dtype)
        ctx.save_for_backward(rows, small, weight, down, up)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients of x [..., in], down [rank, in] and up [out, rank], and of nothing else."""
        rows, small, weight, down, up = ctx.saved_tensors
        upcast = small.dtype
        gradient = gradients[0].flatten(0, -2).to(upcast)
        small_gradient = (gradient @ up.to(upcast)).mul_(ctx.scale)
        for_x = for_down = for_up = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ weight.to(upcast)).addmm_(small_gradient, down.to(upcast)).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[3]:
            for_down = (small_gradient.T @ rows.to(upcast)).float()
        if ctx.needs_input_grad[4]:
            for_up = (gradient.T @ small).float()
        return for_x, None, None, for_down, for_up, None, None
