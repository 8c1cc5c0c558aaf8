"""Prepared samples on the disk, found by what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.config.schema import CacheConfig, DataConfig
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.core.files import (
    atomic_path,
    check_writable,
    default_cache_path,
    remove_leftovers,
    save_tensors,
    user_path,
)
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols import Family
from lora_diffusion.core.types import Loaded, Prepared, Sample
from lora_diffusion.data._progress import watch
from lora_diffusion.data.kinds import KINDS, Kind

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 2
"""Raised whenever the same sample would be opened or stored differently."""
_LEFTOVER_AGE_S = 3600.0
"""Half-written files that are older were left by a killed process; younger ones may be another's work."""
_MEMORY_BYTES = 2**30
"""Items that need no more than this are kept in memory, which saves some percent of a small base's step."""


@dataclass(frozen=True)
class _FileTensors(Mapping[str, "Tensor"]):
    """The tensors of a cache file, read when they are asked for."""

    path: Path
    names: tuple[str, ...]

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        if name not in self.names:
            raise KeyError(name)
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor.clone()  # a mapped file that is cut off by another program would end the process
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"The cache file {self.path} was deleted or damaged during the run ({error}); start the command again, "
                "the file is then made anew."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


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

    A file is named by the hash of all that its content depends on: the family's `cache_key` and the kind's `identity`
    of the sample. Names and repeats are not part of it, so renaming a file costs nothing.

    Args:
        family: prepares samples of one group together, and must give one item for each.
        loaded: the base.
        samples: as the kind's `read` gives them.
        trained: names of the trained parts.
        config: where the cache is.
        data: how the samples are opened.

    Returns:
        Items with their tensors in memory, or, where all together are large, read from the cache on each access.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    root, kind = _root(config), KINDS[family.sample_type]
    base_key = family.cache_key(loaded.options, trained)
    paths = [_cache_file(root, base_key, kind.identity(sample, data)) for sample in samples]
    missing = {path: sample for path, sample in zip(paths, samples, strict=True) if _read(path, sample) is None}
    if missing:
        remove_leftovers(root, "*/*/", _LEFTOVER_AGE_S)
        told = (len(missing), len(samples), kind.noun)
        logger.info("Preparing %d of %d %s; the others are in the cache.", *told)
    batches = _split(missing, kind, data)
    for batch in watch(batches, len(batches), f"Preparing {kind.noun}"):
        chosen = [kind.open(missing[path], data) for path in batch]
        for path, item in zip(batch, family.prepare(loaded, chosen, trained), strict=True):
            _write(path, item)
    items = [_read_again(path, sample) for path, sample in zip(paths, samples, strict=True)]
    if sum(path.stat().st_size for path in set(paths)) <= _MEMORY_BYTES:
        return [replace(item, tensors=dict(item.tensors)) for item in items]
    return items


def _cache_file(root: Path, base_key: str, identity: Sequence[Any]) -> Path:
    digest = hashlib.sha256(json.dumps([_VERSION, base_key, *identity]).encode()).hexdigest()
    return root / digest[:2] / digest[2:4] / f"{digest}.safetensors"


def _split(missing: Mapping[Path, Sample], kind: Kind, data: DataConfig) -> list[list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for path, sample in missing.items():
        groups[kind.group(sample)].append(path)
    batches = []
    for paths in groups.values():
        length = kind.num_at_once(missing[paths[0]], data)
        batches += [paths[start : start + length] for start in range(0, len(paths), length)]
    return batches


def _read(path: Path, sample: Sample) -> Prepared | None:
    """Returns the item of a cache file, or None if there is no file or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, tuple(file.keys())
    except (OSError, SafetensorError) as error:
        logger.warning("The cache file %s is damaged (%s) and is made again.", path, error)
        return None
    if metadata.get("content") != path.stem:
        logger.warning("The cache file %s holds another sample than its name says and is made again.", path)
        return None
    return Prepared(sample.key, _FileTensors(path, names), metadata["group"], sample.num_repeats)


def _read_again(path: Path, sample: Sample) -> Prepared:
    item = _read(path, sample)
    if item is None:
        raise RunError(f"The cache file {path} of {sample.key} cannot be read back; is the disk full or failing?")
    return item


def _write(path: Path, item: Prepared) -> None:
    metadata = {"content": path.stem, "group": item.group, "key": item.key, "num_repeats": str(item.num_repeats)}
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in item.tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_tensors(tensors, temporary, metadata)
    except OSError as error:
        raise ConfigError(
            f"cache.path: {path.parent} cannot be written ({error.strerror}); free space or set another cache.path."
        ) from error
