"""A training step with fake tensors: they have a shape, a dtype and a device, and no memory.

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

from lora_diffusion.runtime.bf16_emulation import upcast_dtype


def use_placeholders(network: nn.Module, quantized: Iterable[str], quantization: str) -> None:
    """Lets layers behave as their quantized forms will: each use of the weight makes an upcast copy of it.

    Args:
        network: changed in place, before it gets an adapter.
        quantized: paths of plain layers.
        quantization: 8bit or nf4.
    """
    for path in quantized:
        layer = network.get_submodule(path)
        layer.__class__ = _PLACEHOLDERS[quantization, type(layer)]


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
        dtype: of the frozen weights.
        context: what the trainer computes the forward pass in.
        set_up: changes the networks once they are on the device.
    """
    with _Lifetimes() as lifetimes:
        inputs = {name: _on(kwargs, device, dtype) for name, kwargs in examples.items()}
        for name in examples:
            _move(parts[name], device, dtype)
        if set_up:
            set_up(parts)
        lifetimes.start()
        outputs: list[Tensor] = []
        for name, kwargs in inputs.items():
            if outputs:  # what an earlier part gave carries its gradient
                kwargs = {key: _with_gradient(value) for key, value in kwargs.items()}  # noqa: PLW2901
            with context():
                output = parts[name](**kwargs)[0]
            if output.requires_grad:
                outputs.append(output)
            del output
        loss: Any = sum(one.float().square().mean() for one in outputs)
        torch.autograd.backward(loss)
        peak_bytes: int = lifetimes.peak_bytes
        return peak_bytes


def _move(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            stored_dtype = parameter.dtype if parameter.requires_grad else dtype
            moved = torch.empty(parameter.shape, dtype=stored_dtype, device=device)
            setattr(module, name, nn.Parameter(moved, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            stored_dtype = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=stored_dtype, device=device))


def _on(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {key: _on(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _with_gradient(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


class _FakeTensor(Tensor):
    """A tensor that has all but numbers. torch's own FakeTensor is the same, and imports the whole compiler."""

    inner: Tensor  # type: ignore[assignment]
    """Its shape, dtype and layout, on the meta device; the storage is shared by all views of one tensor."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> _FakeTensor:
        fake: _FakeTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        fake.inner = inner
        return fake

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func} was called on a fake tensor outside of its step.")


class _Lifetimes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes all tensors in the context fake, and adds up what they would take as long as each lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        """Calls on the meta device what is called on any; the output is where it would be."""
        inputs: list[_FakeTensor] = []
        options = dict(kwargs or {})
        requested = options.get("device")
        on_meta = [_on_meta(value, inputs) for value in args]
        options = {name: _on_meta(value, inputs) for name, value in options.items()}
        if requested is not None:
            options["device"] = "meta"
        # A single number may lie on the CPU beside tensors of another device.
        devices = [tensor.device for tensor in sorted(inputs, key=lambda tensor: not tensor.dim())]
        device = torch.device(requested) if requested is not None else devices[0] if devices else torch.device("cpu")
        known = {id(tensor.inner): tensor for tensor in inputs}
        rule = None if options else _RULES.get(func)
        output = rule(on_meta) if rule else None
        return self._fake(func(*on_meta, **options) if output is None else output, known, device)

    def _fake(self, output: Any, known: Mapping[int, _FakeTensor], device: torch.device) -> Any:
        if isinstance(output, Tensor):
            if (same := known.get(id(output))) is not None:
                return same
            self._add(output)
            return _FakeTensor(output, device)
        if isinstance(output, list | tuple):
            return type(output)(self._fake(one, known, device) for one in output)
        return output

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
"""What gives, from floats, floats of the widest dtype among them; torch itself imports its compiler for that."""


def _pointwise(args: Sequence[Any]) -> Tensor | None:
    """Returns the output of one of these, or None where dtypes must be promoted first."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors}
    # A single number does not upcast the others.
    if not all(tensor.is_floating_point() and (tensor.dim() or len(dtypes) == 1) for tensor in tensors):
        return None
    dtype = reduce(torch.promote_types, dtypes)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
    like = next((tensor for tensor in tensors if tensor.shape == shape), None)
    return torch.empty(shape, dtype=dtype, device="meta") if like is None else torch.empty_like(like, dtype=dtype)


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
"""Operator -> what gives its output on the meta device, or None where torch itself must."""


def _on_meta(value: Any, arguments: list[_FakeTensor]) -> Any:
    """Returns an argument with tensors on the meta device, and adds fake ones to `arguments`."""
    if isinstance(value, _FakeTensor):
        arguments.append(value)
        return value.inner
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, list | tuple):
        return [_on_meta(one, arguments) for one in value]
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
    """Upcasts the weight for each use, in both passes to what the device computes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.weight, ctx.settings, ctx.shape = weight, settings, x.shape
        upcast = torch.empty_like(weight)
        # Activations are in channels_last, and torch lays the weight out like them beside the first copy.
        return torch.conv2d(x, upcast.clone(memory_format=torch.channels_last), bias, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dtype = upcast_dtype(gradients[0].dtype, gradients[0].device)
        upcast, gradient = torch.empty_like(ctx.weight).to(dtype), gradients[0].to(dtype)
        for_x: Tensor = conv2d_input(ctx.shape, upcast, gradient, *ctx.settings)  # type: ignore[no-untyped-call]
        return for_x.to(gradients[0].dtype), None, None, None


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns [..., out] of [..., in], or [batch, out, height, width], as the quantized layer does."""
        output: Tensor = _LinearProduct.apply(input, self.weight, self.bias)
        return output


class _Linear8bit(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns [..., out] of [..., in], or [batch, out, height, width], as the quantized layer does."""
        output: Tensor = _Linear8bitProduct.apply(input, self.weight)  # a bias is added in place
        return output


class _Conv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        """Returns [..., out] of [..., in], or [batch, out, height, width], as the quantized layer does."""
        settings = (self.stride, self.padding, self.dilation, self.groups)
        output: Tensor = _ConvProduct.apply(input, self.weight, self.bias, settings)
        return output


_PLACEHOLDERS: Mapping[tuple[str, type[nn.Module]], type[nn.Module]] = {
    ("8bit", nn.Linear): _Linear8bit,
    ("nf4", nn.Linear): _Linear,
    ("nf4", nn.Conv2d): _Conv2d,
}
"""(quantization, class of a plain layer) -> the placeholder of its quantized form."""
