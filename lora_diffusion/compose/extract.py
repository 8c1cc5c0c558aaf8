"""The difference of two checkpoints as an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.compose.checkpoint import Checkpoint
from lora_diffusion.compose.linear import Sum, as_lora
from lora_diffusion.compose.tensor_file import TensorFile
from lora_diffusion.core import lowrank
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.lowrank import RankRule
from lora_diffusion.core.rng import derive
from lora_diffusion.core.types import ModuleKey

if TYPE_CHECKING:
    from torch import Tensor

_TEXT = "text_model."
_SHOWN = 10


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
    for key in keys:
        old, new = base.read(key), tuned.read(key)
        if old.shape != new.shape:
            misfits.append(f"{key.part}/{key.path}: {list(old.shape)} and {list(new.shape)}")
        elif not misfits and (change := new - old).any():
            kept[key] = lowrank.truncate_dense(change, rule, derive(seed, "sketch", key.part, key.path))
        else:
            num_equal += 1
    if misfits:
        raise ModelError(
            f"{base.path} and {tuned.path} are not of one kind: {len(misfits)} modules have other shapes.",
            misfits[:_SHOWN],
        )
    if not kept:
        raise ModelError(f"None of the {len(keys)} modules differs between {base.path} and {tuned.path}.")
    changes = Sum(
        {key: as_lora(truncated.factors) for key, truncated in kept.items()},
        {key: truncated.norm for key, truncated in kept.items()},
        {key: truncated.error for key, truncated in kept.items()},
    )
    return Extraction(changes, num_equal, _others(base, tuned, keys))


def _others(base: Checkpoint, tuned: Checkpoint, keys: Sequence[ModuleKey]) -> tuple[str, ...] | None:
    import torch

    if base.path.is_file() != tuned.path.is_file():
        return None
    looked_at = {_identity(base, place.file, place.name) for key in keys for place in base.places(key)}
    old, new = _tensors(base), _tensors(tuned)
    names = [name for name in {**old, **new} if name not in looked_at]
    return tuple(
        name
        for name in names
        if name not in old or name not in new or not torch.equal(_read(*old[name]), _read(*new[name]))
    )


def _tensors(checkpoint: Checkpoint) -> dict[str, tuple[TensorFile, str]]:
    """Returns the tensors of a checkpoint by a name that does not depend on the names of its files."""
    found: dict[str, tuple[TensorFile, str]] = {}
    for path, file in checkpoint.files.items():
        for name in file.tensors:
            found.setdefault(_identity(checkpoint, path, name), (file, name))
    return found


def _identity(checkpoint: Checkpoint, path: Path, name: str) -> str:
    if checkpoint.path.is_file():
        return name
    return (path.relative_to(checkpoint.path).parent / name.removeprefix(_TEXT)).as_posix()


def _read(file: TensorFile, name: str) -> Tensor:
    # Number types may differ between the two; a copy in another type is no change.
    tensor = file.read(name)
    return tensor.float() if tensor.is_floating_point() else tensor
