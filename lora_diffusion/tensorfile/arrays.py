"""Tensors as files hold them: numpy arrays of the stored numbers.

Work that only moves numbers between files needs nothing else, and so does not wait for torch, whose import takes
longer than all of it. Of dtypes that numpy lacks an array holds the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.errors import AdapterFileError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = numpy.ndarray[Any, Any]


def _bits(name: str, num_bytes: int) -> numpy.dtype[Any]:
    return numpy.dtype([(name, f"<u{num_bytes}")])


DTYPES: Mapping[str, numpy.dtype[Any]] = {
    "BOOL": numpy.dtype("?"),
    "U8": numpy.dtype("u1"),
    "I8": numpy.dtype("i1"),
    "F8_E5M2": _bits("F8_E5M2", 1),
    "F8_E4M3": _bits("F8_E4M3", 1),
    "I16": numpy.dtype("<i2"),
    "F16": numpy.dtype("<f2"),
    "BF16": _bits("BF16", 2),
    "I32": numpy.dtype("<i4"),
    "F32": numpy.dtype("<f4"),
    "F64": numpy.dtype("<f8"),
    "I64": numpy.dtype("<i8"),
}
"""Name in safetensors -> type of the array, in the order by which the library sorts tensors, last first."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ENDLESS = {
    "F64": 0x7FF0_0000_0000_0000,
    "F32": 0x7F80_0000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E5M2": 0x7C,
    "F8_E4M3": 0x7F,
}
"""Dtype -> the bits that are all set in NaN and infinity, and in nothing else."""
_IN_TORCH = {"BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn"}
"""Dtype that numpy lacks -> torch's name of it."""
_FROM_TORCH = {_IN_TORCH.get(name, dtype.name): name for name, dtype in DTYPES.items()}
"""Torch's name of a dtype -> the name in safetensors."""


def torch_dtype(name: str) -> torch.dtype | None:
    """Returns torch's dtype of a name in safetensors, None where it is not known here."""
    import torch

    return getattr(torch, _IN_TORCH.get(name, DTYPES[name].name)) if name in DTYPES else None


def stored_name(dtype: torch.dtype) -> str:
    """Returns the name in safetensors of a dtype of torch."""
    return _FROM_TORCH[str(dtype).removeprefix("torch.")]


def name_of(array: Array) -> str:
    """Returns the dtype of an array of any shape, as safetensors names it."""
    return _NAMES[array.dtype]


def is_floating(array: Array) -> bool:
    """Says whether an array of any shape holds floating-point numbers."""
    return name_of(array) in _ENDLESS


def bits(array: Array) -> Array:
    """Returns the same memory as whole numbers in the same shape, by which NaN equals NaN."""
    return array.view(f"<u{array.itemsize}")


def same_bits(first: Array, second: Array) -> bool:
    """Says whether two arrays of any shapes are equal in dtype, shape and every bit."""
    return first.dtype == second.dtype and numpy.array_equal(bits(first), bits(second))


def raw(array: Array) -> memoryview:
    """Returns the bytes of an array of any shape."""
    return array.reshape(-1).view(numpy.uint8).data


def is_finite(array: Array) -> bool:
    """Says whether an array of any shape is free of NaN and infinity."""
    endless = _ENDLESS.get(name_of(array))
    return endless is None or not bool(((bits(array) & endless) == endless).any())


def upcast(array: Array) -> Array:
    """Returns the numbers as float32 in the same shape."""
    if name_of(array) == "BF16":
        return (bits(array).astype("<u4") << 16).view("<f4")
    if name_of(array) in _IN_TORCH:
        return as_array(to_torch(array).float())
    with numpy.errstate(over="ignore", invalid="ignore"):
        wide: Array = array.astype("<f4", copy=False)
    return wide


def to_torch(array: Array) -> Tensor:
    """Returns a tensor of the same shape that shares the memory."""
    import torch

    other = _IN_TORCH.get(name_of(array))
    if other is None:
        return torch.from_numpy(array)
    whole = torch.from_numpy(bits(array).view(f"<i{array.itemsize}"))
    numbers: Tensor = whole.view(getattr(torch, other))
    return numbers


def as_array(tensor: Any) -> Array:
    """Returns a tensor of torch as an array of the same shape; an array is returned as it is.

    Raises:
        AdapterFileError: its dtype is none that adapters use.
    """
    if isinstance(tensor, numpy.ndarray):
        return tensor
    plain = tensor.detach().to("cpu").contiguous()
    name = str(plain.dtype).removeprefix("torch.")
    if name not in _FROM_TORCH:
        raise AdapterFileError(f"Numbers of type {name} cannot be stored; adapters do not use them.")
    dtype = DTYPES[_FROM_TORCH[name]]
    if name not in _IN_TORCH.values():
        array: Array = plain.numpy()
        return array
    import torch

    whole: Array = plain.view(torch.int16 if dtype.itemsize == 2 else torch.uint8).numpy()
    return whole.view(dtype)


def in_float32(state: AdapterState) -> AdapterState:
    """Returns a state of stored arrays as all other packages take it, in torch's float32."""
    return replace(
        state,
        modules={
            key: replace(
                adapter, tensors={name: to_torch(as_array(array)).float() for name, array in adapter.tensors.items()}
            )
            for key, adapter in state
        },
    )
