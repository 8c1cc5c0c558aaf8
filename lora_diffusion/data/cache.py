"""Prepared samples on the disk, found by what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.config.schema import CacheConfig
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.core.files import atomic_path, check_writable, default_cache_path, sha256
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols import Family
from lora_diffusion.core.types import ImageText, Loaded, Prepared
from lora_diffusion.data import images
from lora_diffusion.data._progress import watch

if TYPE_CHECKING:
    from torch import Tensor

_VERSION = 1
"""Raised whenever the same sample would be scaled, cropped or stored differently."""
_MEMORY_BYTES = 2**30
"""Items that need no more than this are kept in memory, which saves some percent of a small base's step."""
_BATCH_PIXELS = 1024**2
_BATCH_SAMPLES = 16


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
    return Path(config.path).expanduser() if config.path else default_cache_path() / "prepared"


def prepare(
    family: Family,
    loaded: Loaded,
    samples: Sequence[ImageText],
    trained: frozenset[str],
    config: CacheConfig,
    flip: bool,
) -> list[Prepared]:
    """Returns one item for each sample, in their order; only what the cache lacks is prepared.

    A file is named by the hash of all that its content depends on: the family's `cache_key`, the bytes of the picture,
    its bucket, `flip`, and the captions. Names and repeats are not part of it, so renaming a picture costs nothing.

    Args:
        family: prepares samples of equal size together, and must give one item for each.
        loaded: the base.
        samples: as `sources.read` gives them.
        trained: names of the trained parts.
        config: where the cache is.
        flip: give the family each picture and its mirror image.

    Returns:
        Items with their tensors in memory, or, where all together are large, read from the cache on each access.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    root = _root(config)
    base_key = family.cache_key(loaded.options, trained)
    paths = [_cache_file(root, base_key, sample, flip) for sample in samples]
    missing = {path: sample for path, sample in zip(paths, samples, strict=True) if _read(path, sample) is None}
    if missing:
        logger.info("Preparing %d of %d pictures; the others are in the cache.", len(missing), len(samples))
    batches = _split(missing, 1 + flip)
    for batch in watch(batches, len(batches), "Preparing pictures"):
        chosen = [
            replace(missing[path], pixels=images.load_pixels(missing[path].path, missing[path].size, flip))
            for path in batch
        ]
        for path, item in zip(batch, family.prepare(loaded, chosen, trained), strict=True):
            _write(path, item)
    items = [_read_again(path, sample) for path, sample in zip(paths, samples, strict=True)]
    if sum(path.stat().st_size for path in set(paths)) <= _MEMORY_BYTES:
        return [replace(item, tensors=dict(item.tensors)) for item in items]
    return items


def _cache_file(root: Path, base_key: str, sample: ImageText, flip: bool) -> Path:
    parts = [_VERSION, base_key, sha256(sample.path), sample.size, flip, sample.captions, sample.prior_caption]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return root / digest[:2] / digest[2:4] / f"{digest}.safetensors"


def _split(missing: Mapping[Path, ImageText], num_views: int) -> list[list[Path]]:
    by_size: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path, sample in missing.items():
        by_size[sample.size].append(path)
    batches = []
    for (width, height), paths in by_size.items():
        length = min(max(_BATCH_PIXELS // (width * height * num_views), 1), _BATCH_SAMPLES)
        batches += [paths[start : start + length] for start in range(0, len(paths), length)]
    return batches


def _read(path: Path, sample: ImageText) -> Prepared | None:
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


def _read_again(path: Path, sample: ImageText) -> Prepared:
    item = _read(path, sample)
    if item is None:
        raise RunError(f"The cache file {path} of {sample.key} cannot be read back; is the disk full or failing?")
    return item


def _write(path: Path, item: Prepared) -> None:
    from safetensors.torch import save_file

    metadata = {"content": path.stem, "group": item.group, "key": item.key, "num_repeats": str(item.num_repeats)}
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in item.tensors.items()}
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata)
    except OSError as error:
        raise ConfigError(
            f"cache.path: {path.parent} cannot be written ({error.strerror}); free space or set another cache.path."
        ) from error
