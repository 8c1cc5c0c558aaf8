"""A training step without numbers: tensors that have a shape, a type and a device, and no memory.

torch then makes the same choices as in the run, such as which attention kernel, and each tensor's life can be followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_diffusion.core.products import product_dtype


def stand_in(network: nn.Module, quantized: Iterable[str], kind: str) -> None:
    """Lets layers behave as their quantized forms will: each use of the weight makes a wide copy of it.

    Args:
        network: changed in place, before it gets an adapter.
        quantized: paths of plain layers.
        kind: 8bit or nf4.
    """
    for path in quantized:
        layer = network.get_submodule(path)
        layer.__class__ = _STAND_INS[kind, type(layer)]


def take_step(
    parts: Mapping[str, nn.Module],
    examples: Mapping[str, Mapping[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    context: Callable[[], AbstractContextManager[Any]],
    set_up: Callable[[Mapping[str, nn.Module]], None] | None = None,
) -> int:
    """Returns the most bytes that one forward and backward pass needs beside weights and adapters, gradients included.

    Args:
        parts: networks with their adapters on the meta device; afterwards they cannot be used.
        examples: part -> keyword arguments of one call on the meta device, in the order of the calls.
        device: where the run will be.
        dtype: number type of the frozen weights.
        context: what the trainer computes the forward pass in.
        set_up: changes the networks once they are on the device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _Lives() as lives:
        inputs = {name: _on(kwargs, device, dtype) for name, kwargs in examples.items()}
        for name in examples:
            _move(parts[name], device, dtype)
        if set_up:
            set_up(parts)
        lives.start()
        outputs: list[Tensor] = []
        for name, kwargs in inputs.items():
            if outputs:  # what an earlier part made carries its gradient
                kwargs = {key: _with_gradient(value) for key, value in kwargs.items()}  # noqa: PLW2901
            with context():
                answer = parts[name](**kwargs)[0]
            if answer.requires_grad:
                outputs.append(answer)
            del answer
        torch.autograd.backward(sum(output.float().square().mean() for output in outputs))
        return lives.peak_bytes


def _move(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = parameter.dtype if parameter.requires_grad else dtype
            made = torch.empty(parameter.shape, dtype=kind, device=device)
            setattr(module, name, nn.Parameter(made, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.zeros(buffer.shape, dtype=kind, device=device))


def _on(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {key: _on(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return torch.zeros(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _with_gradient(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Lives(TorchDispatchMode):
    """Adds up the memory of all tensors that are made in the context, as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    def start(self) -> None:
        """Counts from here; what lives already is not part of it."""
        self.peak_bytes = self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = {_identity(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (key := _identity(tensor)) not in inputs | self._known:
                self._add(tensor, key)
        return made

    def _add(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        self._known.add(key)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._bytes -= num_bytes


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _LinearProduct(torch.autograd.Function):
    """Upcasts the weight for each use, as bitsandbytes does with NF4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(x, torch.empty_like(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ torch.empty_like(ctx.weight).to(gradients[0].dtype), None, None


class _Linear8bitProduct(torch.autograd.Function):
    """Multiplies whole numbers and scales the products, as MatMul8bitLt of bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.input = weight, x  # kept until the backward pass
        rows = x.reshape(-1, x.shape[-1]).to(torch.float16).to(torch.int8)
        shape = len(rows), len(weight)
        sums = torch.empty(shape, dtype=torch.int32, device=x.device)
        scaled = sums.float()
        if x.device.type == "cpu":
            # Without a fused kernel, int8_mm_dequant makes the scales of all products, and a copy for each factor.
            scales = torch.empty_like(scaled)
            scaled = scaled.mul(0.5)
            del scales
        return scaled.to(x.dtype).reshape(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0] @ torch.empty_like(ctx.weight).to(gradients[0].dtype), None


class _ConvProduct(torch.autograd.Function):
    """Widens the weight for each use, in both passes to what the device computes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.weight, ctx.settings, ctx.shape = weight, settings, x.shape
        wide = torch.empty_like(weight)
        # Activations are in channels_last, and torch lays the weight out like them beside the first copy.
        return torch.conv2d(x, wide.clone(memory_format=torch.channels_last), bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kind = product_dtype(gradients[0].dtype, gradients[0].device)
        wide, gradient = torch.empty_like(ctx.weight).to(kind), gradients[0].to(kind)
        for_x: Tensor = conv2d_input(ctx.shape, wide, gradient, *ctx.settings)  # type: ignore[no-untyped-call]
        return for_x.to(gradients[0].dtype), None, None, None


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns what the layer would."""
        answer: Tensor = _LinearProduct.apply(input, self.weight, self.bias)
        return answer


class _Linear8bit(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns what the layer would."""
        answer: Tensor = _Linear8bitProduct.apply(input, self.weight)  # a bias is added in place
        return answer


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns what the layer would."""
        settings = (self.stride, self.padding, self.dilation, self.groups)
        answer: Tensor = _ConvProduct.apply(input, self.weight, self.bias, settings)
        return answer


_STAND_INS: Mapping[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("8bit", nn.Linear): _Linear8bit,
    ("nf4", nn.Linear): _Linear,
    ("nf4", nn.Conv2d): _Conv2d,
}
"""(kind, class of a plain layer) -> what stands for its quantized form."""
