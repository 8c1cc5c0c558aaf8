"""Reads and writes safetensors files with every check that a stranger's file needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import AdapterFileError, NonFiniteError, VerificationError
from lora_diffusion.core.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LARGEST_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
_LENGTH_BYTES = 8
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SHOWN_NAMES = 10


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    """As safetensors spells it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any tensor is read."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads names, shapes and metadata without reading tensors.

    Raises:
        AdapterFileError: not a whole safetensors file; a pickle is refused, since reading one can run code.
    """
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}.")
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_LENGTH_BYTES + 1)
        length = int.from_bytes(start[:_LENGTH_BYTES], "little")
        _check_start(path, start, length, num_bytes)
        stream.seek(_LENGTH_BYTES)
        text = stream.read(length)
    values = _parse(path, text)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not texts")
    tensors = {name: _tensor_info(path, name, value) for name, value in values.items()}
    data_bytes = num_bytes - _LENGTH_BYTES - length
    wanted = max((value["data_offsets"][1] for value in values.values()), default=0)
    if wanted != data_bytes:
        raise _damaged(path, f"its header announces {wanted:,} bytes of tensors, but {data_bytes:,} follow")
    return Header(tensors, metadata)


def _check_start(path: Path, start: bytes, length: int, num_bytes: int) -> None:
    if start[_LENGTH_BYTES:] == b"{" and length <= min(num_bytes - _LENGTH_BYTES, LARGEST_HEADER_BYTES):
        return
    if start.startswith(_PICKLE_STARTS) or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise AdapterFileError(
            f"{path} is a pickle, and reading one can run code that its author put there. Ask for a .safetensors file, "
            "or convert it yourself: safetensors.torch.save_file(torch.load(OLD, weights_only=True), NEW)."
        )
    if start.startswith(b"version "):
        raise AdapterFileError(f"{path} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'.")
    if start[_LENGTH_BYTES:] == b"{" and length > LARGEST_HEADER_BYTES:
        raise _damaged(path, f"its header would have {length:,} bytes, more than {LARGEST_HEADER_BYTES:,}")
    if start[_LENGTH_BYTES:] == b"{":
        raise _damaged(path, f"its header should have {length:,} bytes, but the file has {num_bytes:,} in all")
    raise AdapterFileError(f"{path} is not a safetensors file; give an adapter that ends in .safetensors.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            raise _damaged(path, f"its header names {next(name for name in names if names.count(name) > 1)} twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _damaged(path, "its header is not a table of tensors")
    return values


def _tensor_info(path: Path, name: str, value: Any) -> TensorInfo:
    try:
        start, end = value["data_offsets"]
        shape = tuple(value["shape"])
        sound = 0 <= start <= end and all(isinstance(side, int) and side >= 0 for side in shape)
        info = TensorInfo(str(value["dtype"]), shape)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its header does not describe {name} properly") from error
    if not sound:
        raise _damaged(path, f"its header gives {name} an impossible place or shape")
    return info


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors, on the CPU, and the metadata.

    Raises:
        AdapterFileError: see `read_header`; or tensors hold NaN or infinity, up to ten of them named.
    """
    header = read_header(path)
    tensors = load_unchecked(path)
    broken = non_finite(tensors)
    if broken:
        raise AdapterFileError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity; its training went wrong, so use an "
            "earlier checkpoint.",
            broken[:_SHOWN_NAMES],
        )
    return tensors, dict(header.metadata)


def load_unchecked(path: Path) -> dict[str, Tensor]:
    """Reads all tensors whatever numbers they hold."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that hold NaN or infinity."""
    import torch

    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes tensors that `cast` gave atomically, after reading them back and comparing them bit for bit.

    Raises:
        VerificationError: what was read back differs; nothing stands under the name then.
    """
    import torch
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, dict(metadata))
        again, told = load(temporary)
        if told != dict(metadata) or again.keys() != tensors.keys():
            raise VerificationError(f"{path} was read back with other names or metadata; is the disk sound?")
        changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, again[name])]
        if changed:
            raise VerificationError(f"{path} was read back with other numbers; is the disk sound?", changed[:10])


def cast(module: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor as a file can hold it: in its number type, on the CPU, in one piece.

    Raises:
        NonFiniteError: it holds NaN or infinity, or becomes infinite in `dtype`; names the module.
    """
    import torch

    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"The adapter of {module} holds NaN or infinity; use an earlier checkpoint.")
    small = tensor.detach().to("cpu", dtype).contiguous()
    if not bool(torch.isfinite(small).all()):
        raise NonFiniteError(
            f"The adapter of {module} has values up to {float(tensor.abs().max()):g}, which {dtype} cannot hold; "
            "write the file with output.dtype=bf16 or fp32."
        )
    return small


def _damaged(path: Path, reason: str) -> AdapterFileError:
    return AdapterFileError(f"{path} is damaged: {reason}. Download or copy it again.")
