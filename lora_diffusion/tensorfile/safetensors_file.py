"""Reads and writes safetensors files with every check that a stranger's file needs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from lora_diffusion.core.errors import AdapterFileError, NonFiniteError, NumberRangeError, VerificationError
from lora_diffusion.core.files import atomic_path
from lora_diffusion.tensorfile.arrays import (
    DTYPES,
    Array,
    as_array,
    is_finite,
    is_floating,
    name_of,
    raw,
    same_bits,
    to_torch,
    upcast,
)
from lora_diffusion.tensorfile.header import LENGTH_BYTES, damaged
from lora_diffusion.tensorfile.header import Header as Header
from lora_diffusion.tensorfile.header import TensorInfo as TensorInfo
from lora_diffusion.tensorfile.header import encode as encode
from lora_diffusion.tensorfile.header import pickled as pickled
from lora_diffusion.tensorfile.header import read_header as read_header

if TYPE_CHECKING:
    import torch

_SHOWN_NAMES = 10


def check_numbers(path: Path, tensors: Mapping[str, Array]) -> None:
    """Checks that tensors of any shape are such as an adapter has.

    Raises:
        AdapterFileError: some hold NaN or infinity, or no weights at all, up to ten named.
    """
    broken = non_finite(tensors)
    if broken:
        raise AdapterFileError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN, infinity or more than float32 can; its "
            "training went wrong, so use an earlier checkpoint.",
            broken[:_SHOWN_NAMES],
        )
    odd = not_weights(tensors)
    if odd:
        raise AdapterFileError(
            f"{path}: {len(odd)} of {len(tensors)} tensors are empty or hold whole numbers, which no adapter does; "
            "make the file again with the tool that wrote it.",
            odd[:_SHOWN_NAMES],
        )


def load_unchecked(path: Path) -> dict[str, Array]:
    """Reads all tensors, of any shape and whatever numbers they hold, in the order in which they are stored."""
    header = read_header(path)
    return arrays_of(header, read_content(path, header))


def read_content(path: Path, header: Header) -> bytearray:
    """Returns all bytes that follow the header of a file."""
    start = LENGTH_BYTES + header.num_bytes
    content = bytearray(path.stat().st_size - start)
    with path.open("rb") as stream:
        stream.seek(start)
        if stream.readinto(content) != len(content):
            raise damaged(path, "it was cut off while it was read")
    return content


def arrays_of(header: Header, content: bytearray) -> dict[str, Array]:
    """Returns the tensors of a file, of any shape, as views of its bytes behind the header, in the order of storage."""
    stored = sorted(header.tensors.items(), key=lambda item: item[1].place)
    return {
        name: numpy.ndarray(info.shape, DTYPES[info.dtype], buffer=content, offset=info.place[0])
        for name, info in stored
    }


def non_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Returns the names of tensors that hold NaN, infinity or more than float32, in which all compute, can hold."""
    arrays = ((name, as_array(tensor)) for name, tensor in tensors.items())
    return [name for name, array in arrays if not is_finite(upcast(array) if name_of(array) == "F64" else array)]


def not_weights(tensors: Mapping[str, Array]) -> list[str]:
    """Returns the names of tensors, of any shape, that are empty, or whole numbers that are neither flag nor shape."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.size == 0
        or (tensor.size > 1 and not is_floating(tensor) and not name.endswith((".reshape_weight", ".on_input")))
    ]


def layout(tensors: Mapping[str, Array]) -> dict[str, TensorInfo]:
    """Returns the order in which the safetensors library would store tensors of any shape, and the place of each."""
    types = list(DTYPES)
    places, start = {}, 0
    for name in sorted(tensors, key=lambda name: (-types.index(name_of(tensors[name])), name)):
        end = start + tensors[name].nbytes
        places[name] = TensorInfo(name_of(tensors[name]), tensors[name].shape, (start, end))
        start = end
    return places


def save(tensors: Mapping[str, Array], metadata: Mapping[str, str], path: Path) -> None:
    """Writes tensors of any shape that `cast` gave atomically, after reading them back and comparing them bit for bit.

    Raises:
        VerificationError: what was read back differs; nothing stands under the name then.
    """
    places = layout(tensors)
    with atomic_path(path) as temporary:
        _write(temporary, encode(places, metadata), (raw(tensors[name]) for name in places))
        again, read_metadata = load_unchecked(temporary), dict(read_header(temporary).metadata)
        if read_metadata != dict(metadata) or again.keys() != tensors.keys():
            raise VerificationError(f"{path} was read back with other names or metadata; is the disk sound?")
        changed = [name for name, tensor in tensors.items() if not same_bits(tensor, again[name])]
        if changed:
            raise VerificationError(f"{path} was read back with other numbers; is the disk sound?", changed[:10])


def _write(path: Path, header: bytes, pieces: Iterable[memoryview]) -> None:
    with path.open("wb") as stream:
        stream.write(header)
        stream.writelines(pieces)


def rewrite(path: Path, old: Header, metadata: Mapping[str, str], output: Path) -> None:
    """Writes a file with other metadata atomically; the bytes of the tensors are copied as they are.

    Raises:
        AdapterFileError: the file cannot be read, or the metadata are too large.
        VerificationError: what was read back differs; nothing stands under the name then.
    """
    with atomic_path(output) as temporary:
        with path.open("rb") as source, temporary.open("wb") as target:
            source.seek(LENGTH_BYTES + old.num_bytes)
            target.write(encode(old.tensors, metadata or None))
            shutil.copyfileobj(source, target)
        new = read_header(temporary)
        if dict(new.metadata) != dict(metadata) or new.tensors != old.tensors:
            raise VerificationError(f"{output} was read back with other names or metadata; is the disk sound?")
        if content_hash(temporary, new) != content_hash(path, old):
            raise VerificationError(f"{output} was read back with other numbers; is the disk sound?")


def content_hash(path: Path, header: Header) -> str:
    """Returns the sha256 of all that follows the header."""
    with path.open("rb") as stream:
        stream.seek(LENGTH_BYTES + header.num_bytes)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cast(module: str, tensor: Any, dtype: torch.dtype | None) -> Array:
    """Returns a tensor of torch, or an array, as a file can hold it: in its dtype, the same shape and one piece.

    Args:
        module: whose it is, for messages.
        tensor: the numbers.
        dtype: dtype in the file; None keeps that of the tensor.

    Raises:
        NonFiniteError: it holds NaN or infinity; names the module.
        NumberRangeError: it becomes infinite in `dtype`; names the module.
    """
    array = as_array(tensor)
    small = array if dtype is None else as_array(to_torch(array).to(dtype))
    if is_finite(small):
        return small
    if not is_finite(array):
        raise NonFiniteError(f"The adapter of {module} holds NaN or infinity; use an earlier checkpoint.")
    raise NumberRangeError(
        f"The adapter of {module} has values up to {numpy.abs(upcast(array)).max():g}, which {dtype} cannot hold"
    )
