"""The header of a safetensors file, read with the mistrust that a stranger's file deserves.

The safetensors library checks most of this too, but later, in other words, and without limits that suit adapters.
"""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.files import not_a_file
from lora_diffusion.core.text import shown

LARGEST_HEADER_BYTES = 16 * 2**20
"""An SDXL adapter of every module and an image needs one; the library itself would take 100 MB."""
LARGEST_METADATA_CHARACTERS = 8 * 2**20
"""All names and texts together."""
_LONGEST_NAME = 1000
"""Characters of a tensor's name; real ones have up to 150."""
LENGTH_BYTES = 8
"""Little-endian length of the header, at the start of the file."""
_BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_BYTES_OF |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str
    """As safetensors names it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    place: tuple[int, int] = field(default=(0, 0), compare=False)
    """First byte, and the one behind the last, counted from the end of the header."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself before any tensor is read."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    start: bytes = b'{"'
    """Its first two bytes, by which A1111 knows the file."""
    num_bytes: int = 0
    """Of the header alone; the tensors begin LENGTH_BYTES behind it."""


def is_pickle(path: Path) -> bool:
    """Says whether a file is a pickle, by its first bytes, or its ending where it is no safetensors file."""
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES + 1)
    return start.startswith(_PICKLE_STARTS) or (
        start[LENGTH_BYTES:] != b"{" and path.suffix.lower() in _PICKLE_SUFFIXES
    )


def read_header(path: Path) -> Header:
    """Reads names, shapes and metadata without reading tensors.

    Raises:
        AdapterFileError: not a whole safetensors file; a pickle is refused, since reading one can run code.
    """
    if obstacle := not_a_file(path):
        raise AdapterFileError(f"{path} is {obstacle} and no file; name an adapter file.")
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}.")
    num_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(LENGTH_BYTES + 1)
        length = int.from_bytes(start[:LENGTH_BYTES], "little")
        _check_start(path, start, length, num_bytes)
        stream.seek(LENGTH_BYTES)
        text = stream.read(length)
    values = _parse(path, text)
    metadata = _metadata(path, values.pop("__metadata__", {}))
    tensors = {name: _tensor_info(path, name, value) for name, value in values.items()}
    _check_places(path, tensors, num_bytes - LENGTH_BYTES - length)
    return Header(tensors, metadata, text[:2], length)


def encode(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """Returns the start of a file as the library writes it, the length of the header included.

    Like the library it writes empty metadata, which hashes depend on, and leaves out those that are None.
    """
    places = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.place} for name, info in tensors.items()
    }
    table = {"__metadata__": dict(metadata), **places} if metadata is not None else places
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def damaged(path: Path, reason: str) -> AdapterFileError:
    """Returns the error for a file that no copy of itself can be."""
    return AdapterFileError(f"{path} is damaged: {reason}. Download or copy it again.")


def pickled(path: Path, source: Path, output: str) -> AdapterFileError:
    """Returns the error for a pickle.

    Args:
        path: the pickle.
        source: what is to be converted, it or its folder.
        output: the other arguments of the conversion.
    """
    return AdapterFileError(
        f"{path} is a pickle, and reading one can run code that its author put there. Ask for a .safetensors file, or "
        f"convert it without running any: lora-diffusion convert {shlex.quote(str(source))} {output} --from-pickle."
    )


def _check_start(path: Path, start: bytes, length: int, num_bytes: int) -> None:
    if not num_bytes:
        raise damaged(path, "it is empty")
    is_json = start[LENGTH_BYTES:] == b"{"
    if is_json and length <= min(num_bytes - LENGTH_BYTES, LARGEST_HEADER_BYTES):
        return
    if is_pickle(path):
        raise pickled(path, path, "NEW.safetensors --to kohya")
    if start.startswith(b"version "):
        raise AdapterFileError(f"{path} is a Git LFS pointer, not the file itself; fetch it with 'git lfs pull'.")
    if is_json and length > LARGEST_HEADER_BYTES:
        raise damaged(path, f"its header would have {length:,} bytes, more than {LARGEST_HEADER_BYTES:,}")
    if is_json:
        raise damaged(path, f"its header should have {length:,} bytes, but the file has {num_bytes:,} in all")
    raise AdapterFileError(f"{path} is not a safetensors file; give an adapter that ends in .safetensors.")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            raise damaged(path, f"its header names {_twice(names)} twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise damaged(path, "its header is not a table of tensors")
    return values


def _twice(names: Sequence[str]) -> str:
    return shown(repr(next(name for name, count in Counter(names).items() if count > 1)))


def _metadata(path: Path, values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(_is_text(text) for item in values.items() for text in item):
        raise damaged(path, "its metadata are not texts")
    size = sum(len(name) + len(value) for name, value in values.items())
    if size > LARGEST_METADATA_CHARACTERS:
        raise damaged(path, f"its metadata hold {size:,} characters, more than {LARGEST_METADATA_CHARACTERS:,}")
    return values


def _is_text(value: Any) -> bool:
    """Says whether a value is a text that any stream can show: JSON allows halves of characters (lone surrogates)."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _tensor_info(path: Path, name: str, value: Any) -> TensorInfo:
    if not name or len(name) > _LONGEST_NAME:
        raise damaged(path, f"its header names a tensor by {len(name):,} characters")
    if not name.isprintable():
        raise damaged(path, f"its header names a tensor {name!r}, with characters that cannot be shown")
    try:
        start, end = value["data_offsets"]
        shape, dtype = tuple(value["shape"]), value["dtype"]
        numbers = [start, end, *shape]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its header does not describe {name} properly") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise damaged(path, f"its header gives {name} an impossible place or shape")
    if not isinstance(dtype, str) or dtype not in _BYTES_OF:
        raise AdapterFileError(
            f"{path}: {name} is of dtype {shown(repr(dtype))}, which adapters do not use; make the file "
            "again in fp16, bf16 or fp32."
        )
    if end - start != math.prod(shape) * _BYTES_OF[dtype]:
        raise damaged(
            path, f"its header gives {name} {end - start:,} bytes, but {dtype} {list(shape)} needs another number"
        )
    return TensorInfo(dtype, shape, (start, end))


def _check_places(path: Path, tensors: Mapping[str, TensorInfo], num_bytes: int) -> None:
    """Checks that the tensors follow each other without gap or overlap up to the last byte of the file."""
    reached = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].place):
        start, end = info.place
        if start != reached:
            problem = "overlaps another tensor" if start < reached else "follows a gap"
            raise damaged(path, f"{name} {problem}: it begins at byte {start:,} instead of {reached:,}")
        reached = end
    if reached != num_bytes:
        raise damaged(path, f"its header announces {reached:,} bytes of tensors, but {num_bytes:,} follow")
