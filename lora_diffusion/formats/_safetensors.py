"""Reads and writes safetensors files with every check that a stranger's file needs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import AdapterFileError, NonFiniteError, VerificationError
from lora_diffusion.core.files import atomic_path, save_tensors
from lora_diffusion.formats._header import LENGTH_BYTES, damaged
from lora_diffusion.formats._header import Header as Header
from lora_diffusion.formats._header import TensorInfo as TensorInfo
from lora_diffusion.formats._header import read_header as read_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SHOWN_NAMES = 10


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads all tensors, on the CPU, and the metadata.

    Raises:
        AdapterFileError: see `read_header`; or tensors hold NaN or infinity, or no weights at all, up to ten named.
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
    odd = not_weights(tensors)
    if odd:
        raise AdapterFileError(
            f"{path}: {len(odd)} of {len(tensors)} tensors are empty or hold whole numbers, which no adapter does; "
            "make the file again with the tool that wrote it.",
            odd[:_SHOWN_NAMES],
        )
    return tensors, dict(header.metadata)


def load_unchecked(path: Path) -> dict[str, Tensor]:
    """Reads all tensors whatever numbers they hold."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(path, str(error)) from error


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: Tensor) -> bool:
    import torch

    # NaN and infinity stay in a sum, which costs a fifth; but large numbers can overflow in it. Sums know no 8-bit
    # floats, and neither does isfinite.
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    kind = torch.float32 if wide.dtype.itemsize < 4 and wide.is_floating_point() else None
    return bool(torch.isfinite(wide.sum(dtype=kind))) or bool(torch.isfinite(wide).all())


def not_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that are empty, or hold several whole numbers; one alone may be an alpha."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.numel() == 0 or (tensor.numel() > 1 and not tensor.is_floating_point())
    ]


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes tensors that `cast` gave atomically, after reading them back and comparing them bit for bit.

    Raises:
        VerificationError: what was read back differs; nothing stands under the name then.
    """
    with atomic_path(path) as temporary:
        save_tensors(tensors, temporary, metadata)
        again, told = load_unchecked(temporary), dict(read_header(temporary).metadata)
        if told != dict(metadata) or again.keys() != tensors.keys():
            raise VerificationError(f"{path} was read back with other names or metadata; is the disk sound?")
        changed = [name for name, tensor in tensors.items() if not _same_bits(tensor, again[name])]
        if changed:
            raise VerificationError(f"{path} was read back with other numbers; is the disk sound?", changed[:10])


def rewrite(path: Path, metadata: Mapping[str, str], output: Path) -> None:
    """Writes a file with other metadata atomically; the bytes of the tensors are copied as they are.

    Raises:
        AdapterFileError: the file cannot be read, or the metadata are too large.
        VerificationError: what was read back differs; nothing stands under the name then.
    """
    old = read_header(path)
    places = {
        name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.place}
        for name, info in old.tensors.items()
    }
    table = {"__metadata__": dict(metadata), **places} if metadata else places
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with atomic_path(output) as temporary:
        with path.open("rb") as source, temporary.open("wb") as target:
            source.seek(LENGTH_BYTES + old.num_bytes)
            target.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
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


def _same_bits(first: Tensor, second: Tensor) -> bool:
    import torch

    if first.dtype != second.dtype:
        return False
    if first.element_size() == 2:  # whole numbers are compared several times faster than small floats
        first, second = first.view(torch.int16), second.view(torch.int16)
    return torch.equal(first, second)


def cast(module: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor as a file can hold it: in its number type, on the CPU, in one piece.

    Raises:
        NonFiniteError: it holds NaN or infinity, or becomes infinite in `dtype`; names the module.
    """
    small = tensor.detach().to("cpu", dtype).contiguous()
    if _is_finite(small):
        return small
    if not _is_finite(tensor):
        raise NonFiniteError(f"The adapter of {module} holds NaN or infinity; use an earlier checkpoint.")
    raise NonFiniteError(
        f"The adapter of {module} has values up to {float(tensor.abs().max()):g}, which {dtype} cannot hold; "
        "write the file with output.dtype=bf16 or fp32."
    )
