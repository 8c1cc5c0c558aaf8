"""Writing an adapter so that what lies on disk is known to be what was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.errors import VerificationError
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.read_modules import FLAGS
from lora_diffusion.tensorfile.arrays import Array, as_array, same_bits, upcast
from lora_diffusion.tensorfile.safetensors_file import cast

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Written:
    """A file that was read back."""

    path: Path
    rounding: float
    """Norm of what rounding to the file's dtype changed, relative to the norm of all tensors; 0 if nothing."""


def write_verified(state: AdapterState, key_map: KeyMap, format_: Format, path: Path, dtype: torch.dtype) -> Path:
    """Writes a state in the layout that every reader of the format reads right, and reads it back.

    Args:
        state: the adapter; tensors float32.
        key_map: names of the base's modules in this format.
        format_: format of the file.
        path: file or folder; replaced if it exists.
        dtype: dtype in the file.

    Returns:
        The path.

    Raises:
        VerificationError: the file differs from the state by more than the rounding to `dtype`.
        UnsupportedError: the format cannot hold a variant.
    """
    return write_exactly(format_.normalize(state), key_map, format_, path, dtype).path


def write_exactly(
    state: AdapterState, key_map: KeyMap, format_: Format, path: Path, dtype: torch.dtype | None
) -> Written:
    """Writes a state as it is, reads the file back and compares every bit.

    Args:
        state: the adapter; tensors, or arrays as `Format.read` gives them.
        key_map: names of the base's modules in this format.
        format_: format of the file.
        path: file or folder; replaced if it exists.
        dtype: dtype in the file; None keeps that of each tensor.

    Raises:
        VerificationError: the file holds anything but the state rounded to `dtype`.
        UnsupportedError: the format cannot hold a variant.
    """
    format_.write(state, key_map, path, dtype)
    again = format_.read(parse_file(path), key_map)
    errors = [f"{key.part}/{key.path}: is missing" for key in state.modules if key not in again.modules]
    errors += [f"{key.part}/{key.path}: was not written" for key in again.modules if key not in state.modules]
    lost = whole = 0.0
    for key, adapter in state:
        if key in again.modules:
            rounded = {
                name: cast(key.path, tensor, None if name in FLAGS else dtype)
                for name, tensor in adapter.tensors.items()
            }
            error = _difference(adapter, rounded, again.modules[key])
            errors += [f"{key.part}/{key.path}: {error}"] if error else []
            if dtype is not None:
                lost += _squares(
                    upcast(as_array(tensor)) - upcast(rounded[name]) for name, tensor in adapter.tensors.items()
                )
                whole += _squares(map(upcast, rounded.values()))
    errors += _changed_embeddings(state, again)
    if errors:
        raise VerificationError(f"{path} does not hold what was to be written; do not use it.", errors[:10])
    return Written(path, math.sqrt(lost / whole) if whole else 0.0)


def _changed_embeddings(written: AdapterState, read: AdapterState) -> list[str]:
    names = {**written.embeddings, **read.embeddings}
    both = written.embeddings.keys() & read.embeddings.keys()
    return [
        f"the embedding {name} differs"
        for name in names
        if name not in both or not same_bits(as_array(written.embeddings[name]), as_array(read.embeddings[name]))
    ]


def _difference(written: ModuleAdapter, rounded: Mapping[str, Array], read: ModuleAdapter) -> str:
    if (read.variant, read.tensors.keys()) != (written.variant, written.tensors.keys()):
        return f"is {read.variant} of {', '.join(read.tensors)}"
    # An alpha is kept as float32.
    if not math.isclose(read.scale, written.scale, rel_tol=1e-6):
        return f"its scale became {read.scale:g} instead of {written.scale:g}"
    changed = [name for name, array in rounded.items() if not same_bits(array, as_array(read.tensors[name]))]
    return f"the numbers of {', '.join(changed)} differ" if changed else ""


def _squares(arrays: Iterable[Array]) -> float:
    return sum(float(numpy.vdot(array, array)) for array in arrays)
