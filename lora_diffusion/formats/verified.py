"""Writing an adapter so that what lies on disk is known to be what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import VerificationError
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.protocols import Format
from lora_diffusion.core.types import AdapterState

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def write_verified(state: AdapterState, key_map: KeyMap, format_: Format, path: Path, dtype: torch.dtype) -> Path:
    """Writes a state, reads the file back and compares every tensor with what was to be stored.

    Args:
        state: the adapter; tensors float32.
        key_map: names of the base's modules in this format.
        format_: how to spell the file.
        path: file or folder; replaced if it exists.
        dtype: number type in the file.

    Returns:
        The path.

    Raises:
        VerificationError: the file differs from the state by more than the rounding to `dtype`.
    """
    format_.write(state, key_map, path, dtype)
    again = format_.read(path, key_map)
    faults = [str(key) for key in state.modules if key not in again.modules]
    faults += [str(key) for key in again.modules if key not in state.modules]
    for key, adapter in state:
        read = again.modules.get(key)
        if read is None:
            continue
        # A format may write another alpha and scale `up` for it, but then their product stays.
        told, found = (adapter.tensors["up"].float() * adapter.alpha, read.tensors["up"].float() * read.alpha)
        if not _close(adapter.tensors["down"].float(), read.tensors["down"].float(), dtype):
            faults.append(f"{key.part}/{key.path} down: numbers differ")
        if not _close(told / adapter.alpha, found / adapter.alpha, dtype):
            faults.append(f"{key.part}/{key.path} up: numbers or alpha differ")
    if faults:
        raise VerificationError(f"{path} does not hold what was trained; do not use it.", faults[:10])
    return path


def _close(told: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    import torch

    kind = torch.finfo(dtype)
    # Rounding to `dtype` moves a number by half of eps; below the smallest normal number the steps are of one size.
    return told.shape == found.shape and torch.allclose(
        told, found, rtol=kind.eps, atol=kind.smallest_normal * kind.eps
    )
