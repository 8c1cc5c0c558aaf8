"""The images of an evaluation: each is named by all that decides what it shows, and generated only if it is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.core.files import atomic_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.core.text import name_some
from lora_diffusion.evaluation.images import is_whole, save_generated
from lora_diffusion.evaluation.results import BASE

_VERSION = 2
"""Raised whenever the same base, adapters and request would give another image."""
CHUNK = 16
"""Images generated together. Their last bits depend on it, so it is not a setting."""

Look = tuple[tuple[str, float], ...]
"""Content hash and weight of each adapter in use, sorted; () is the base alone."""
Generate = Callable[[str, Sequence[Request]], Sequence[Output]]
"""Generates requests with the adapters of the candidate of that name."""
Place = tuple[str, int, int]
"""Candidate, index of the case, seed."""


@dataclass(frozen=True)
class Chunk:
    """Images of one candidate that are generated together."""

    candidate: str
    requests: Mapping[str, Request]
    """Key -> what to generate."""


@dataclass(frozen=True)
class Sheet:
    """All images of an evaluation."""

    keys: Mapping[Place, str]
    """Where an image is wanted -> its key; places that look alike share an image."""
    chunks: Sequence[Chunk]


def look(adapters: Iterable[tuple[str, float]]) -> Look:
    """Returns what decides the images of adapters (content hash, weight); their order does not, nor does weight 0."""
    return tuple(sorted((digest, weight) for digest, weight in adapters if weight))


def lay_out(
    base_key: str,
    looks: Mapping[str, Look],
    requests: Mapping[tuple[int, int], Request],
    base_requests: Mapping[tuple[int, int], Request] | None = None,
) -> Sheet:
    """Returns which image goes where, and the chunks in which they are generated.

    A chunk has one seed, so that a question with more seeds has all chunks of that with fewer. What it holds depends on
    the evaluation only, never on what is there already or on who generates it: an image has the same bits whether it
    is made at once, after a stop, or by another process.

    Args:
        base_key: names the base's weights, dtype and device.
        looks: candidate -> its adapters.
        requests: (index of the case, seed) -> what to generate, without adapter weights.
        base_requests: the same with other indices, of what only the base generates; in chunks of their own.
    """
    keys: dict[Place, str] = {}
    chunks: list[Chunk] = []
    known: set[str] = set()
    wanted = [(candidate, adapters, requests) for candidate, adapters in looks.items()]
    for candidate, adapters, of_candidate in [*wanted, (BASE, (), base_requests or {})]:
        missing: dict[int, dict[str, Request]] = {}
        for (case, seed), request in of_candidate.items():
            key = image_key(base_key, adapters, request)
            keys[candidate, case, seed] = key
            if key not in known:
                known.add(key)
                missing.setdefault(seed, {})[key] = request
        chunks += [Chunk(candidate, part) for of_seed in missing.values() for part in _parts(of_seed)]
    return Sheet(keys, chunks)


def _parts(requests: Mapping[str, Request]) -> list[Mapping[str, Request]]:
    names = list(requests)
    return [{key: requests[key] for key in names[start : start + CHUNK]} for start in range(0, len(names), CHUNK)]


def image_key(base_key: str, look: Look, request: Request) -> str:
    """Returns the name of an image: a hash of all that it depends on; the request must give the guidance."""
    assert request.guidance is not None
    # Without guidance the negative prompt is not looked at.
    negative = request.negative if request.guidance > 1 else ""
    settings = [request.prompt, negative, request.seed, request.num_steps, float(request.guidance), request.size]
    return hashlib.sha256(json.dumps([_VERSION, base_key, look, *settings]).encode()).hexdigest()


def image_path(folder: Path, key: str) -> Path:
    """Returns the file of an image in a folder of images."""
    return folder / f"{key}.png"


def generate_missing(
    chunks: Sequence[Chunk], folder: Path, cache: Path | None, generate: Generate, share: tuple[int, int] = (0, 1)
) -> int:
    """Generates the images that are neither in the folder nor in the cache, and returns how many were written.

    A chunk that lacks an image is generated as a whole; those of its images that are there are kept. A damaged file is
    as good as none, and replaced.

    Args:
        chunks: of `lay_out`.
        folder: gets all images.
        cache: folder that evaluations share, which gets them too; None for none.
        generate: generates a chunk.
        share: (index, number) of this process; it takes care of every number-th chunk.
    """
    index, num_shares = share
    share_chunks = chunks[index::num_shares]
    keys = [key for chunk in share_chunks for key in chunk.requests]
    there = _whole(keys, folder)
    if cache is not None:
        there |= _copy([key for key in keys if key not in there], cache, folder)
    missing = [chunk for chunk in share_chunks if not chunk.requests.keys() <= there]
    logger.info(
        "Generating %d of %d images; the others are there.", sum(len(chunk.requests) for chunk in missing), len(keys)
    )
    num_written = 0
    for chunk in missing:
        outputs = generate(chunk.candidate, list(chunk.requests.values()))
        for key, output in zip(chunk.requests, outputs, strict=True):
            if key not in there:
                save_generated(output, image_path(folder, key))
                num_written += 1
        if cache is not None:
            _copy(list(chunk.requests), folder, cache)
        logger.info("Generated: %s, %d images", chunk.candidate, len(chunk.requests))
    return num_written


def _copy(keys: Sequence[str], source: Path, target: Path) -> set[str]:
    """Copies those images that the source has whole and the target has not, and returns them."""
    missing = _whole(keys, source) - _whole(keys, target)
    for key in sorted(missing):
        with atomic_path(image_path(target, key)) as temporary:
            shutil.copyfile(image_path(source, key), temporary)
    return missing


def _whole(keys: Sequence[str], folder: Path) -> set[str]:
    """Returns the images that a folder has and that can be read."""
    there = [key for key in keys if image_path(folder, key).is_file()]
    damaged = [key for key in there if not is_whole(image_path(folder, key))]
    if damaged:
        names = name_some([image_path(folder, key).name for key in damaged])
        logger.warning("%d images of %s are damaged, so they do not count: %s", len(damaged), folder, names)
    return {*there} - {*damaged}
