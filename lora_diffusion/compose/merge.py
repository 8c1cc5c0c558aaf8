"""Adapters added into a base checkpoint on disk."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.algebra.delta import delta_weight
from lora_diffusion.compose.checkpoint import Checkpoint, Place, check_space, is_plain
from lora_diffusion.compose.linear import Term, keys
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import UnsupportedError, VerificationError
from lora_diffusion.core.files import atomic_path, read_json, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.tensorfile.streaming import Change, TensorFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WEIGHT_SUFFIXES = frozenset((".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data"))
_INDEX = ".safetensors.index.json"
_MOST_NAMED = 10


@dataclass(frozen=True)
class Merged:
    """A base checkpoint with adapters in it."""

    path: Path
    num_modules: int
    num_changed: int
    """Tensors that differ from the base; one may hold several modules, and a folder may hold a module twice."""
    num_kept: int
    """Tensors of the rewritten files that are those of the base, apart from their dtype."""


def merge(
    checkpoint: Checkpoint, terms: Sequence[Term], path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]
) -> Merged:
    """Writes a base with the weighted changes of adapters added: summed in float32, cast once, read back and compared.

    The change of each adapter is that to the weight of the base alone, as it is where adapters stay live. Files beside
    the weights are copied, hidden ones and weights that would keep the old state are left out with a warning.

    Args:
        checkpoint: the base, left as it is.
        terms: adapters that fit it.
        path: folder if the base is one, else file; replaced if it exists.
        dtype: that of the weights and biases of the networks that can hold adapters; None keeps each its own.
            All else keeps its own anyhow: noise schedules that programs sample by, marks, ids, the VAE.
        metadata: added to the metadata of every changed file.

    Raises:
        ModelError: the base lacks the weight of a module.
        UnsupportedError: the base is stored quantized.
        ConfigError: the disk has too little space.
        NonFiniteError: a sum does not fit the dtype.
        VerificationError: what was read back differs.
    """
    changes = _changes(checkpoint, terms)
    jobs = {checkpoint.path: Path()} if checkpoint.path.is_file() else _folder_jobs(checkpoint)
    dtypes = {file: dict.fromkeys(checkpoint.weights(file), dtype) if dtype else {} for file in checkpoint.files}
    rewritten = {file: checkpoint.files[file] for file in jobs if file in changes or dtypes.get(file)}
    copied = [file.stat().st_size for file in jobs if file not in rewritten]
    check_space(path, sum(copied) + sum(source.size_as(dtypes[file]) for file, source in rewritten.items()))
    with atomic_path(path) as temporary:
        for file, relative in jobs.items():
            target = temporary / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if file in rewritten:
                changes_of_file = changes.get(file, {})
                rewritten[file].rewrite(target, changes_of_file, dtypes[file], metadata if changes_of_file else {})
                rewritten[file].verify(target, changes_of_file, dtypes[file])
            else:
                _copy(file, target)
        if dtype:
            _correct_indices(temporary)
    num_changed = sum(map(len, changes.values()))
    num_kept = sum(len(source.tensors) for source in rewritten.values()) - num_changed
    return Merged(path, len(keys(terms)), num_changed, num_kept)


def _changes(checkpoint: Checkpoint, terms: Sequence[Term]) -> dict[Path, dict[str, Change]]:
    """Returns file -> tensor name -> what is to be done to it."""
    pieces: dict[Path, dict[str, list[_Piece]]] = {}
    for key in keys(terms):
        present = [term for term in terms if key in term.state.modules]
        if weighted := [term for term in present if term.state.modules[key].changes_weight]:
            for place in checkpoint.places(key):
                pieces.setdefault(place.file, {}).setdefault(place.name, []).append(_Piece(place, key, weighted))
        if biased := [term for term in present if "bias" in term.state.modules[key].tensors]:
            for place in checkpoint.places(key, "bias"):
                pieces.setdefault(place.file, {}).setdefault(place.name, []).append(_Bias(place, key, biased))
    for file, names in pieces.items():
        _check_floating(checkpoint.files[file], names)
    return {file: {name: _change(parts) for name, parts in names.items()} for file, names in pieces.items()}


@dataclass(frozen=True)
class _Piece:
    """The weight of one module, which may be a piece of a tensor, and the adapters that change it."""

    place: Place
    key: ModuleKey
    terms: Sequence[Term]

    def change(self, whole: Tensor) -> None:
        """Adds the changes of all adapters to the weight in place."""
        weight = self.place.view(whole)
        # The change of a dora is that of the frozen weight, of which the others need no copy: it may be large.
        is_needed = any(term.state.modules[self.key].needs_base for term in self.terms)
        base = weight.clone() if is_needed else weight
        for term in self.terms:
            weight += delta_weight(term.state.modules[self.key], base).mul_(term.weights[self.key.part])


class _Bias(_Piece):
    def change(self, whole: Tensor) -> None:
        """Adds the changes of the bias."""
        bias = self.place.view(whole)
        for term in self.terms:
            change = term.state.modules[self.key].tensors["bias"]
            bias += term.weights[self.key.part] * change.float().reshape(bias.shape)


def _change(pieces: Sequence[_Piece]) -> Change:
    def change(tensor: Tensor) -> Tensor:
        import torch

        whole = tensor.to(torch.float32, copy=True)
        for piece in pieces:
            piece.change(whole)
        return whole

    return change


def _check_floating(file: TensorFile, names: Iterable[str]) -> None:
    dtypes = {name: file.tensors[name].dtype for name in names}
    wrong = [f"{name} is {dtype}" for name, dtype in dtypes.items() if not is_plain(dtype)]
    if wrong:
        raise UnsupportedError(
            f"{file.path} stores {len(wrong)} of the weights quantized, and merging would round the adapter away; "
            "merge into the checkpoint that was quantized, then quantize the result.",
            wrong[:_MOST_NAMED],
        )


def _folder_jobs(checkpoint: Checkpoint) -> dict[Path, Path]:
    """Returns file of the folder -> its path below it, for all that belongs to the merged model."""
    folder = checkpoint.path
    files = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
    visible = {
        file: relative for file, relative in files.items() if not any(part.startswith(".") for part in relative.parts)
    }
    others = {file: relative for file, relative in visible.items() if file not in checkpoint.files}
    stale = [file for file, relative in others.items() if _is_stale(file, relative)]
    if stale:
        logger.warning(
            "%d weight file(s) are left out, since they would still hold the base without the adapters: %s",
            len(stale),
            name_some([str(visible[file]) for file in stale]),
        )
    return {file: relative for file, relative in visible.items() if file not in stale}


def _is_stale(file: Path, relative: Path) -> bool:
    """Says whether a file holds weights in another form than the one that is merged into."""
    if file.suffix not in _WEIGHT_SUFFIXES:
        return False
    return len(relative.parts) == 1 or (file.suffix != ".safetensors" and any(file.parent.glob("*.safetensors")))


def _copy(file: Path, target: Path) -> None:
    shutil.copy2(file, target)
    if not filecmp.cmp(file, target, shallow=False):
        raise VerificationError(f"{target} was copied with other bytes; is the disk sound?")


def _correct_indices(folder: Path) -> None:
    """Writes the size of the shards, which changes with their dtype, into their indices."""
    for path in folder.rglob(f"*{_INDEX}"):
        index = read_json(path)
        shards = {path.parent / name for name in index.get("weight_map", {}).values()}
        index.setdefault("metadata", {})["total_size"] = sum(TensorFile(shard).size_as({}) for shard in shards)
        write_json(path, index)
