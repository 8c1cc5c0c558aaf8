"""The difference of two checkpoints as an adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.algebra import lowrank
from lora_diffusion.algebra.lowrank import RankRule
from lora_diffusion.compose.checkpoint import Checkpoint
from lora_diffusion.compose.linear import Sum, as_lora
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.rng import derive
from lora_diffusion.tensorfile.streaming import TensorFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TEXT = "text_model."
_MOST_NAMED = 10


@dataclass(frozen=True)
class Extraction:
    """What two checkpoints differ in."""

    changes: Sum
    """Of the modules that differ."""
    num_equal: int
    """Modules that were looked at and do not differ."""
    others: tuple[str, ...] | None
    """Tensors outside those modules that differ, which the adapter does not hold: norms, biases, embeddings, what no
    target names. None if the checkpoints are laid out differently, so that they cannot be compared."""
    rounding: float = 0.0
    """Norm of what rounding to the coarser dtype of the two takes from the other one's weights, relative to that of
    all changes; 0 where both are stored in one dtype."""
    dtypes: tuple[str, ...] = ()
    """Of the two checkpoints, where they differ in a module that changed."""


def extract(base: Checkpoint, tuned: Checkpoint, keys: Sequence[ModuleKey], rule: RankRule, seed: int) -> Extraction:
    """Returns the nearest adapter of the difference tuned - base, one module after the other.

    Args:
        base: what the adapter is to be added to.
        tuned: what it is to become; may be laid out differently.
        keys: the modules to look at.
        rule: rank of each.
        seed: of the randomized range finder.

    Raises:
        ModelError: a module is missing or of another shape in one of them, or nothing differs.
    """
    kept, num_equal, misfits = {}, 0, []
    lost: list[float] = []
    dtypes: tuple[str, ...] = ()
    for key in keys:
        old, new = base.read(key), tuned.read(key)
        if old.shape != new.shape:
            misfits.append(f"{key.part}/{key.path}: {list(old.shape)} and {list(new.shape)}")
        elif not misfits and not same_rounded(old, new):
            change = new.float() - old.float()
            kept[key] = lowrank.truncate_dense(change, rule, derive(seed, "sketch", key.part, key.path))
            if old.dtype != new.dtype:
                lost.append(_rounding(old, new))
                dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (old, new))
        else:
            num_equal += 1
    if misfits:
        raise ModelError(
            f"{base.path} and {tuned.path} are not of one architecture: {len(misfits)} modules have other shapes.",
            misfits[:_MOST_NAMED],
        )
    if not kept:
        raise ModelError(
            f"None of the {len(keys)} modules differs between {base.path} and {tuned.path} by more than the rounding "
            "to another dtype."
        )
    changes = Sum(
        {key: as_lora(truncated.factors) for key, truncated in kept.items()},
        {key: truncated.norm for key, truncated in kept.items()},
        {key: truncated.error for key, truncated in kept.items()},
    )
    whole = math.hypot(*changes.norms.values())
    rounding = math.hypot(*lost) / whole if whole else 0.0
    return Extraction(changes, num_equal, _others(base, tuned, keys), rounding, dtypes)


def same_rounded(first: Tensor, second: Tensor) -> bool:
    """Says whether two tensors of any shapes are equal in the coarser dtype of the two: one may be a copy."""
    import torch

    if first.shape != second.shape or not (first.is_floating_point() and second.is_floating_point()):
        return torch.equal(first, second)
    dtype = _coarser(first, second)
    return torch.equal(first.to(dtype), second.to(dtype))


def _coarser(first: Tensor, second: Tensor) -> torch.dtype:
    import torch

    return max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)


def _rounding(first: Tensor, second: Tensor) -> float:
    """Returns the norm of what rounding to the coarser dtype takes from both."""
    dtype = _coarser(first, second)
    return math.hypot(*(float((weight.float() - weight.to(dtype).float()).norm()) for weight in (first, second)))


def _others(base: Checkpoint, tuned: Checkpoint, keys: Sequence[ModuleKey]) -> tuple[str, ...] | None:
    if base.path.is_file() != tuned.path.is_file():
        return None
    looked_at = {_identity(base, place.file, place.name) for key in keys for place in base.places(key)}
    old, new = _tensors(base), _tensors(tuned)
    names = [name for name in {**old, **new} if name not in looked_at]
    return tuple(
        name
        for name in names
        if name not in old
        or name not in new
        or not same_rounded(*(file.read(tensor_name) for file, tensor_name in (old[name], new[name])))
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, tuple[TensorFile, str]]:
    """Returns the tensors of a checkpoint by a name that does not depend on the names of its files."""
    tensors: dict[str, tuple[TensorFile, str]] = {}
    for path, file in checkpoint.files.items():
        for name in file.tensors:
            tensors.setdefault(_identity(checkpoint, path, name), (file, name))
    return tensors


def _identity(checkpoint: Checkpoint, path: Path, name: str) -> str:
    if checkpoint.path.is_file():
        return name
    return (path.relative_to(checkpoint.path).parent / name.removeprefix(_TEXT)).as_posix()
