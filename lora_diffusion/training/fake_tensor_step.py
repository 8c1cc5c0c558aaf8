"""A training step without numbers: tensors that have a shape, a type and a device, and no memory.

torch then makes the same choices as in the run, such as which attention kernel, and each tensor's life can be followed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input
from torch.utils._python_dispatch import TorchDispatchMode

from lora_diffusion.runtime.bf16_emulation import product_dtype


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
    with _Lives() as lives:
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
            setattr(module, name, torch.empty(buffer.shape, dtype=kind, device=device))


def _on(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {key: _on(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _with_gradient(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Shape(Tensor):
    """A tensor that has all but numbers. torch's own FakeTensor is the same, and imports the whole compiler."""

    inner: Tensor
    """Its shape, type and layout, on the meta device; the storage is shared by all views of one tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> _Shape:
        made: _Shape = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} was called on a tensor without numbers outside of the rehearsal.")


class _Lives(TorchDispatchMode):
    """Makes all tensors in the context without numbers, and adds up what they would take as long as each lives."""

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch imports its whole compiler to leave a mode out of it; nothing is compiled here.
        return False

    def start(self) -> None:
        """Counts from here; what lives already is not part of it."""
        self.peak_bytes = self._bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls on the meta device what is called on any; the answer is where it would be."""
        inputs: list[_Shape] = []
        given = dict(kwargs or {})
        told = given.get("device")
        bare = [_bare(value, inputs) for value in args]
        given = {name: _bare(value, inputs) for name, value in given.items()}
        if told is not None:
            given["device"] = "meta"
        # A single number may lie on the CPU beside tensors of another device.
        homes = [tensor.device for tensor in sorted(inputs, key=lambda tensor: not tensor.dim())]
        device = torch.device(told) if told is not None else homes[0] if homes else torch.device("cpu")
        known = {id(tensor.inner): tensor for tensor in inputs}
        rule = None if given else _RULES.get(func)
        made = rule(bare) if rule else None
        return self._dressed(func(*bare, **given) if made is None else made, known, device)

    def _dressed(self, made: Any, known: Mapping[int, _Shape], device: torch.device) -> Any:
        if isinstance(made, Tensor):
            if (same := known.get(id(made))) is not None:
                return same
            self._add(made)
            return _Shape(made, device)
        if isinstance(made, list | tuple):
            return type(made)(self._dressed(own, known, device) for own in made)
        return made

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:  # a view
            return
        self._known.add(key)
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._bytes -= num_bytes


_ATEN = torch.ops.aten
_POINTWISE = frozenset(
    {_ATEN.add.Tensor, _ATEN.sub.Tensor, _ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.pow.Tensor_Scalar, _ATEN.neg.default}
    | {_ATEN.exp.default, _ATEN.sin.default, _ATEN.cos.default, _ATEN.sigmoid.default, _ATEN.sigmoid_backward.default}
    | {_ATEN.tanh.default, _ATEN.tanh_backward.default, _ATEN.silu.default, _ATEN.silu_backward.default}
    | {_ATEN.gelu.default, _ATEN.gelu_backward.default, _ATEN.mul.Scalar, _ATEN.div.Scalar}
)
"""What gives, from fractions, fractions of the widest type among them; torch itself imports its compiler for that."""


def _pointwise(args: Sequence[Any]) -> Tensor | None:
    """Returns the answer of one of these, or None where types must be settled first."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    kinds = {tensor.dtype for tensor in tensors}
    # A single number does not widen the others.
    if not all(tensor.is_floating_point() and (tensor.dim() or len(kinds) == 1) for tensor in tensors):
        return None
    kind = reduce(torch.promote_types, kinds)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    like = next((tensor for tensor in tensors if tensor.shape == shape), None)
    return torch.empty(shape, dtype=kind, device="meta") if like is None else torch.empty_like(like, dtype=kind)


def _cat(args: Sequence[Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    if len({(tensor.dtype, tensor.dim()) for tensor in tensors}) != 1:
        return None
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, dtype=tensors[0].dtype, device="meta")


def _layer_norm(args: Sequence[Any]) -> tuple[Tensor, ...]:
    x, normalized = args[0], args[1]
    rows = [*x.shape[: x.dim() - len(normalized)], *(1 for _ in normalized)]
    return _contiguous(x), *(torch.empty(rows, device="meta") for _ in range(2))


def _group_norm(args: Sequence[Any]) -> tuple[Tensor, ...]:
    x, num_rows, num_groups = args[0], args[3], args[6]
    return _contiguous(x), *(torch.empty(num_rows, num_groups, device="meta") for _ in range(2))


def _norm_backward(args: Sequence[Any]) -> tuple[Tensor | None, ...] | None:
    """Returns the gradient of the input; gradients of the norm's own weights are left to torch."""
    for_x, *for_weights = args[-1]
    return None if any(for_weights) else (_contiguous(args[1]) if for_x else None, None, None)


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _product(args: Sequence[Any]) -> Tensor:
    _, one, other = args
    return torch.empty(one.shape[0], other.shape[1], dtype=one.dtype, device="meta")


_RULES: Mapping[Any, Callable[[Sequence[Any]], Any]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    _ATEN.addmm.default: _product,
    _ATEN.cat.default: _cat,
    _ATEN.mean.default: lambda args: torch.empty((), dtype=args[0].dtype, device="meta"),
    _ATEN.addmm_.default: lambda args: args[0],
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.native_layer_norm_backward.default: _norm_backward,
    _ATEN.native_group_norm.default: _group_norm,
    _ATEN.native_group_norm_backward.default: _norm_backward,
}
"""Operator -> what gives its answer on the meta device, or None where torch must be asked."""


def _bare(value: Any, found: list[_Shape]) -> Any:
    """Returns an argument with tensors on the meta device, and adds those without numbers to `found`."""
    if isinstance(value, _Shape):
        found.append(value)
        return value.inner
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list | tuple):
        return [_bare(own, found) for own in value]
    return value


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
