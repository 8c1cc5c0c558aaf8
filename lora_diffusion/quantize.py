"""Frozen weights in 8 or 4 bits through bitsandbytes, so that a large base fits a small card.

Quantized are linear layers and, in NF4, convolutions, which hold two thirds of a Stable Diffusion 1.5 UNet. Kept in
high precision are norms, embeddings, the convolutions at the input, at the output and in the last block before it, what
reads the timestep and the sizes, and in NF4 the first layer of a CLIP text encoder: they are small, and everything else
depends on them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.extras import require
from lora_diffusion.runtime.bf16_emulation import upcast_dtype
from lora_diffusion.runtime.device import pick_device

_KEPT = re.compile(
    r"(.*\.)?(time_embedding|time_emb_proj|add_embedding|conv_in|conv_out|text_projection"
    r"|patch_embedding|embed_tokens|lm_head)(\..*)?"
)
_FIRST_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.0\.")
_DEVICES = ("cuda", "cpu", "xpu")
_INT8_THRESHOLD = 6.0
"""Inputs beyond this are multiplied in 16 bits (Dettmers et al. 2022, arXiv 2208.07339, section 3.2)."""
_BLOCK, _SCALES_IN_BLOCK = 64, 256
"""Weights that share a scale in NF4, and scales that share a scale (Dettmers et al. 2023, arXiv 2305.14314)."""
_NF4_TABLE_BYTES = 4 * (16 + 256 + 1)
"""Of each tensor: the 16 levels of the weights, the 256 levels of the scales, and their mean."""
_FLAGS = {"8bit": "is_loaded_in_8bit", "nf4": "is_loaded_in_4bit"}
"""What PEFT reads on a network to choose its layers for quantized weights."""


def check(quantization: str) -> None:
    """Checks that this machine can hold a base that is quantized so.

    Args:
        quantization: value of `model.quantization`.

    Raises:
        UnsupportedError: bitsandbytes is missing, or does not know the device.
    """
    if quantization == "none":
        return
    require("bitsandbytes", f"model.quantization={quantization}")
    device = pick_device()
    if device.type not in _DEVICES:
        raise UnsupportedError(
            f"model.quantization={quantization} cannot run on the device {device.type}, only on {', '.join(_DEVICES)}; "
            "set model.quantization=none."
        )


def layers_to_quantize(network: nn.Module, quantization: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields path and layer of all that is quantized; the meta device is enough.

    Args:
        network: not quantized yet.
        quantization: none, 8bit or nf4.
    """
    # Its errors reach the output undamped: in NF4 these convolutions, 1 or 2 % of the weights, raise the loss of the
    # built-in base by half, and all others together do not. What NF4 does to its text encoder is the first layer's.
    last_block = f"up_blocks.{len(getattr(network, 'up_blocks', ())) - 1}."
    is_text_encoder = getattr(getattr(network, "config", None), "model_type", "") == "clip_text_model"
    for path, module in network.named_modules():
        is_kept = (
            _KEPT.fullmatch(path)
            or (isinstance(module, nn.Conv2d) and path.startswith(last_block))
            or (is_text_encoder and quantization == "nf4" and _FIRST_LAYER.match(path))
        )
        if (quantization, type(module)) in _MAKERS and not is_kept:
            yield path, module


def weight_bytes(network: nn.Module, quantization: str, dtype: torch.dtype) -> int:
    """Returns what a network takes once its weights are quantized, constants included.

    Args:
        network: not quantized yet; the meta device is enough.
        quantization: none, 8bit or nf4.
        dtype: of what stays in high precision.
    """
    plain = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    for _, module in layers_to_quantize(network, quantization):
        weight = module.get_parameter("weight")
        plain += _quantized_bytes(quantization, tuple(weight.shape)) - weight.numel() * dtype.itemsize
    return plain


def _quantized_bytes(quantization: str, shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    if quantization == "8bit":
        return count + 4 * shape[0]
    scales = -(-count // _BLOCK)
    return -(-count // 2) + scales + 4 * -(-scales // _SCALES_IN_BLOCK) + _NF4_TABLE_BYTES


def quantize(network: nn.Module, quantization: str, device: torch.device) -> None:
    """Quantizes the frozen weights of a network in place and moves it; only one layer at a time is in memory twice.

    Args:
        network: in the dtype that is computed in.
        quantization: none, 8bit or nf4.
        device: where the network will be.
    """
    for path in [path for path, _ in layers_to_quantize(network, quantization)]:
        plain = network.get_submodule(path)
        network.set_submodule(path, _MAKERS[quantization, type(plain)](plain, device).requires_grad_(False).eval())
    network.to(device)
    if quantization != "none":
        leave_file(network)
        setattr(network, _FLAGS[quantization], True)
        # It warns of each product whose input is not fp16 already.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def leave_file(network: nn.Module) -> None:
    """Copies weights on the CPU, in place, out of the file that they may be mapped from.

    As long as one tensor of a file is in use, all of it that was ever read counts as memory of the process.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.device.type == "cpu" and tensor.is_floating_point():  # quantized ones are integers
            tensor.data = tensor.data.clone()


def _bitsandbytes() -> Any:
    import bitsandbytes

    return bitsandbytes


def _linear_8bit(layer: Any, device: torch.device) -> nn.Module:
    bnb = _bitsandbytes()

    quantized: Any = bnb.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        has_fp16_weights=False,
        threshold=_INT8_THRESHOLD,
        device="meta",
    )
    quantized.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    placed: nn.Module = quantized.to(device)
    return placed


def _linear_4bit(layer: Any, device: torch.device) -> nn.Module:
    bnb = _bitsandbytes()

    quantized: Any = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    # On processors with AVX512-BF16 it would reorder the weights at the first answer in eval mode, which loses bits of
    # the scales, fits only some shapes, and leaves what neither a backward pass nor a merge can read.
    quantized.support_avx512bf16_for_cpu = False
    quantized.weight = _in_4bit(layer.weight, quantized)
    quantized.bias = layer.bias
    placed: nn.Module = quantized.to(device)
    return placed


def _in_4bit(weight: Tensor, owner: nn.Module) -> Any:
    bnb = _bitsandbytes()

    # As a matrix: on the CPU bitsandbytes compiles a slow function for tensors whose last side is odd, as kernels have.
    return bnb.nn.Params4bit(
        weight.data.flatten(1),
        requires_grad=False,
        blocksize=_BLOCK,
        compress_statistics=True,
        quant_type="nf4",
        module=owner,
    )


class Conv2d4bit(nn.Conv2d):
    """A frozen convolution whose weight is stored in NF4 and upcast while it is used."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns [batch, out, height, width] in the dtype of the input, or of autocast."""
        if not hasattr(self.weight, "quant_state"):  # PEFT makes the factors of an adapter of the base's own class
            return super().forward(input)
        settings = (self.stride, self.padding, self.dilation, self.groups)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        answer: Tensor = _Conv.apply(input, self.weight, shape, self.bias, settings)
        return answer


def _conv_4bit(layer: Any, device: torch.device) -> nn.Module:
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
    quantized = Conv2d4bit(*sizes, *settings, bias=False, device="meta")
    quantized.weight = _in_4bit(layer.weight, quantized)
    quantized.bias = layer.bias
    quantized.to(device)
    quantized.weight.data = quantized.weight.data.view(-1, 1, 1, 1)  # PEFT counts the sides of the kernel on it
    return quantized


class _Conv(torch.autograd.Function):
    """Keeps neither the input nor the upcast weight for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        stored: Any,
        shape: tuple[int, ...],
        bias: Tensor | None,
        settings: tuple[Any, ...],
    ) -> Tensor:
        """Computes in the type of autocast, or of the input."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        ctx.stored, ctx.shape, ctx.settings, ctx.inputs, ctx.dtype = stored, shape, settings, x.shape, x.dtype
        upcast = upcast_dtype(dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            added = None if bias is None else bias.to(upcast)
            return torch.conv2d(x.to(upcast), _dequantized(stored, shape, upcast), added, *settings).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradient of the input alone."""
        upcast = upcast_dtype(gradients[0].dtype, gradients[0].device)
        weight = _dequantized(ctx.stored, ctx.shape, upcast)
        for_x: Tensor = conv2d_input(ctx.inputs, weight, gradients[0].to(upcast), *ctx.settings)  # type: ignore[no-untyped-call]
        return for_x.to(ctx.dtype), None, None, None, None


def _dequantized(stored: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    bnb = _bitsandbytes()

    weight: Tensor = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
    return weight.view(shape).to(dtype)


_MAKERS: Mapping[tuple[str, type[nn.Module]], Callable[[Any, torch.device], nn.Module]] = {
    ("8bit", nn.Linear): _linear_8bit,
    ("nf4", nn.Linear): _linear_4bit,
    ("nf4", nn.Conv2d): _conv_4bit,
}
"""(quantization, class of a layer) -> what makes its quantized form."""
