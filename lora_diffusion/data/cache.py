"""Prepared samples on the disk, found by what they were made from.

The views of an image or recording and the texts of a sample are files of their own, so that a new caption costs no
latent, and an image that two captions describe is encoded once. Each file tells the checksums of its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.config.schema import CacheConfig, DataConfig
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.core.files import (
    atomic_path,
    check_writable,
    default_cache_path,
    parse_json,
    remove_leftovers,
    save_tensors,
    user_path,
)
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import Prepared, Sample
from lora_diffusion.core.text import name_some
from lora_diffusion.data import sample_types
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.runtime.progress import watch

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 3
"""Raised whenever the same sample would be opened or stored differently."""
_LEFTOVER_AGE_S = 3600.0
"""Half-written files that are older were left by a killed process; younger ones may be another's work."""
_MEMORY_BYTES = 2**30
"""Files of no more than this are kept in memory, which saves some percent of a small base's step."""
_TITLES = {"views": "", "texts": "the texts of "}
"""Piece -> what of the samples is prepared, for messages."""


class _DamagedError(Exception):
    """A file does not hold what was written."""


@dataclass(frozen=True)
class _FileTensors(Mapping[str, "Tensor"]):
    """The tensors of a cache file, read when they are asked for."""

    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        try:
            return _load(self.path, [name])[name]
        except _DamagedError as error:
            raise RunError(
                f"The cache file {self.path} was deleted or damaged during the run ({error}); start the command again, "
                "the file is then made again."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class _Files:
    """The files that a run uses: each is read and checked once, and the first stay in memory."""

    _known: dict[Path, Mapping[str, Tensor]] = field(default_factory=dict)
    _num_bytes: int = 0

    def find(self, paths: Iterable[Path]) -> set[Path]:
        """Returns the files that must be made; warns once of those that are there and damaged."""
        distinct = list(dict.fromkeys(paths))
        missing: set[Path] = set()
        damaged = []
        for path in watch(distinct, len(distinct), "Reading the cache"):
            try:
                if path.exists():
                    self.read(path)
                    continue
            except _DamagedError as error:
                damaged.append(f"{path} ({error})")
            missing.add(path)
        if damaged:
            logger.warning(
                "%d cache file(s) are damaged, and what they held is made again: %s", len(damaged), name_some(damaged)
            )
        return missing

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """Returns the tensors of a file, in memory while there is space for them.

        Raises:
            _DamagedError: they are not what was written.
        """
        if path not in self._known:
            tensors = _load(path)
            self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            is_small = self._num_bytes <= _MEMORY_BYTES
            self._known[path] = tensors if is_small else _FileTensors(path, tuple(tensors))
        return self._known[path]


def check(config: CacheConfig) -> None:
    """Checks that the cache folder can be written.

    Raises:
        ConfigError: it cannot.
    """
    check_writable(_root(config), "cache.path")


def _root(config: CacheConfig) -> Path:
    return user_path(config.path, "cache.path") if config.path else default_cache_path() / "prepared"


def prepare(
    family: Family,
    loaded: Loaded,
    samples: Sequence[Sample],
    trained: frozenset[str],
    config: CacheConfig,
    data: DataConfig,
) -> list[Prepared]:
    """Returns one item for each sample, in their order; only what the cache lacks is prepared.

    A file is named by the hash of all that its content depends on: the family's `cache_key` of views or texts, and what
    the sample type says of those of the sample. Names and repeats are not part of it, so renaming a file costs nothing.

    Args:
        family: prepares samples of one group together, and must give one item for each.
        loaded: the base.
        samples: as the sample type's `read` gives them.
        trained: names of the trained parts.
        config: where the cache is.
        data: how the samples are opened.

    Returns:
        Items with their tensors in memory, or, where all together are large, read from the cache on each access.

    Raises:
        ConfigError: the cache folder cannot be written.
        RunError: a file cannot be read back; on access, one was damaged during the run.
    """
    root, sample_type, files = _root(config), sample_types.find(family.sample_type), _Files()
    identities = {
        "views": [sample_type.view_identity(sample, data) for sample in samples],
        "texts": [sample_type.text_identity(sample) for sample in samples],
    }
    keys = {piece: family.cache_key(loaded.options, trained, frozenset({piece})) for piece in identities}
    paths = {
        piece: [_cache_file(root, piece, keys[piece], one) for one in all_identities]
        for piece, all_identities in identities.items()
    }
    missing = files.find(chain.from_iterable(paths.values()))
    if missing:
        remove_leftovers(root, "*/*/", _LEFTOVER_AGE_S)
    for piece, paths_of_piece in paths.items():
        lacking = {path: sample for path, sample in zip(paths_of_piece, samples, strict=True) if path in missing}
        if lacking:
            counts = (_TITLES[piece], len(lacking), len(samples), sample_type.noun)
            logger.info("Preparing %s%d of %d %s; the others are in the cache.", *counts)
            _prepare_missing(lacking, piece, family, loaded, trained, data)
    return [
        Prepared(
            sample.key,
            _joined(_read_again(files, views, sample), _read_again(files, texts, sample)),
            sample_type.group(sample),
            sample.num_repeats,
        )
        for sample, views, texts in zip(samples, paths["views"], paths["texts"], strict=True)
    ]


def _cache_file(root: Path, piece: str, key: str, identity: Sequence[Any]) -> Path:
    digest = hashlib.sha256(json.dumps([_VERSION, piece, key, *identity]).encode()).hexdigest()
    return root / digest[:2] / digest[2:4] / f"{digest}.safetensors"


def _prepare_missing(
    missing: Mapping[Path, Sample],
    piece: str,
    family: Family,
    loaded: Loaded,
    trained: frozenset[str],
    data: DataConfig,
) -> None:
    sample_type = sample_types.find(family.sample_type)
    batches = _split(missing, sample_type, data)
    for batch in watch(batches, len(batches), f"Preparing {_TITLES[piece]}{sample_type.noun}"):
        chosen = [missing[path] for path in batch]
        if piece == "views":
            chosen = [sample_type.open(sample, data) for sample in chosen]
        for path, item in zip(batch, family.prepare(loaded, chosen, trained, frozenset({piece})), strict=True):
            _write(path, item)


def _split(missing: Mapping[Path, Sample], sample_type: SampleType, data: DataConfig) -> list[list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, sample in missing.items():
        groups[sample_type.group(sample)].append(path)
    batches = []
    for paths in groups.values():
        length = sample_type.num_at_once(missing[paths[0]], data)
        batches += [paths[start : start + length] for start in range(0, len(paths), length)]
    return batches


def _read_again(files: _Files, path: Path, sample: Sample) -> Mapping[str, Tensor]:
    try:
        return files.read(path)
    except _DamagedError as error:
        raise RunError(
            f"The cache file {path} of {sample.key} cannot be read back ({error}); is the disk full or failing?"
        ) from error


def _joined(views: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(views, dict) and isinstance(texts, dict):
        return {**views, **texts}
    return ChainMap(texts, views)  # type: ignore[arg-type]  # nobody writes to it


def _load(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Returns tensors of a cache file, all unless names are given, once they are what their checksums say.

    Raises:
        _DamagedError: the file is gone or cut off, is another than its name says, or a bit of it has changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            checksums = parse_json(metadata.get("checksums", "{}"))
            # Cloned, since a mapped file that is cut off by another program would end the process.
            tensors = {name: file.get_tensor(name).clone() for name in (names or file.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    if metadata.get("content") != path.stem:
        raise _DamagedError("it holds another sample than its name says")
    if changed := [name for name, tensor in tensors.items() if checksums.get(name) != _checksum(tensor)]:
        raise _DamagedError(f"its checksum does not fit: {', '.join(changed)}")
    if checksums.keys() != tensors.keys() and names is None:
        raise _DamagedError("it lacks tensors")
    return tensors


def _write(path: Path, item: Prepared) -> None:
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in item.tensors.items()}
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    metadata = {"content": path.stem, "key": item.key, "checksums": json.dumps(checksums)}
    try:
        with atomic_path(path) as temporary:
            save_tensors(tensors, temporary, metadata)
    except OSError as error:
        raise ConfigError(
            f"cache.path: {path.parent} cannot be written ({error.strerror}); free space or set another cache.path."
        ) from error


def _checksum(tensor: Tensor) -> str:
    """Returns the hash of a contiguous tensor's type, shape and bytes."""
    import torch

    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
