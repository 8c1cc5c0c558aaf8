"""The pictures of an evaluation: each is named by all that decides what it shows, and drawn only if it is not there."""

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
from lora_diffusion.evaluation.images import is_whole, save_drawn

_VERSION = 2
"""Raised whenever the same base, adapters and request would be drawn differently."""
CHUNK = 16
"""Pictures drawn together. Their last bits depend on it, so it is not a setting."""

Look = tuple[tuple[str, float], ...]
"""Content hash and weight of each adapter in use, sorted; () is the base alone."""
Draw = Callable[[str, Sequence[Request]], Sequence[Output]]
"""Draws requests with the adapters of the candidate of that name."""
Place = tuple[str, int, int]
"""Candidate, index of the case, seed."""


@dataclass(frozen=True)
class Chunk:
    """Pictures of one candidate that are drawn together."""

    candidate: str
    requests: Mapping[str, Request]
    """Key -> what to draw."""


@dataclass(frozen=True)
class Sheet:
    """All pictures of an evaluation."""

    keys: Mapping[Place, str]
    """Where a picture is wanted -> its key; places that look alike share a picture."""
    chunks: Sequence[Chunk]


def look(adapters: Iterable[tuple[str, float]]) -> Look:
    """Returns what decides the pictures of adapters (content hash, weight); their order does not, nor does weight 0."""
    return tuple(sorted((digest, weight) for digest, weight in adapters if weight))


def lay_out(base_key: str, looks: Mapping[str, Look], requests: Mapping[tuple[int, int], Request]) -> Sheet:
    """Returns which picture goes where, and the chunks in which they are drawn.

    A chunk has one seed, so that a question with more seeds has all chunks of that with fewer. What it holds depends on
    the evaluation only, never on what is there already or on who draws it: a picture has the same bits whether it is
    drawn at once, after a stop, or by another process.

    Args:
        base_key: names the base's weights, number type and device.
        looks: candidate -> its adapters.
        requests: (index of the case, seed) -> what to draw, without adapter weights.
    """
    keys: dict[Place, str] = {}
    chunks: list[Chunk] = []
    known: set[str] = set()
    for candidate, own in looks.items():
        fresh: dict[int, dict[str, Request]] = {}
        for (case, seed), request in requests.items():
            key = picture_key(base_key, own, request)
            keys[candidate, case, seed] = key
            if key not in known:
                known.add(key)
                fresh.setdefault(seed, {})[key] = request
        chunks += [Chunk(candidate, part) for of_seed in fresh.values() for part in _parts(of_seed)]
    return Sheet(keys, chunks)


def _parts(requests: Mapping[str, Request]) -> list[Mapping[str, Request]]:
    names = list(requests)
    return [{key: requests[key] for key in names[start : start + CHUNK]} for start in range(0, len(names), CHUNK)]


def picture_key(base_key: str, look: Look, request: Request) -> str:
    """Returns the name of a picture: a hash of all that it depends on; the request must give the guidance."""
    assert request.guidance is not None
    # Without guidance the negative prompt is not looked at.
    negative = request.negative if request.guidance > 1 else ""
    settings = [request.prompt, negative, request.seed, request.num_steps, float(request.guidance), request.size]
    return hashlib.sha256(json.dumps([_VERSION, base_key, look, *settings]).encode()).hexdigest()


def picture_path(folder: Path, key: str) -> Path:
    """Returns the file of a picture in a folder of pictures."""
    return folder / f"{key}.png"


def draw_missing(
    chunks: Sequence[Chunk], folder: Path, cache: Path | None, draw: Draw, share: tuple[int, int] = (0, 1)
) -> int:
    """Draws the pictures that are neither in the folder nor in the cache, and returns how many were written.

    A chunk that lacks a picture is drawn as a whole; those of its pictures that are there are kept. A damaged file is
    as good as none, and replaced.

    Args:
        chunks: of `lay_out`.
        folder: gets all pictures.
        cache: folder that evaluations share, which gets them too; None for none.
        draw: draws a chunk.
        share: (index, number) of this process; it takes care of every number-th chunk.
    """
    index, num_shares = share
    own = chunks[index::num_shares]
    keys = [key for chunk in own for key in chunk.requests]
    there = _whole(keys, folder)
    if cache is not None:
        there |= _copy([key for key in keys if key not in there], cache, folder)
    missing = [chunk for chunk in own if not chunk.requests.keys() <= there]
    logger.info(
        "Drawing %d of %d pictures; the others are there.", sum(len(chunk.requests) for chunk in missing), len(keys)
    )
    num_written = 0
    for chunk in missing:
        outputs = draw(chunk.candidate, list(chunk.requests.values()))
        for key, output in zip(chunk.requests, outputs, strict=True):
            if key not in there:
                save_drawn(output, picture_path(folder, key))
                num_written += 1
        if cache is not None:
            _copy(list(chunk.requests), folder, cache)
        logger.info("Drawn: %s, %d pictures", chunk.candidate, len(chunk.requests))
    return num_written


def _copy(keys: Sequence[str], source: Path, target: Path) -> set[str]:
    """Copies those pictures that the source has whole and the target has not, and returns them."""
    fresh = _whole(keys, source) - _whole(keys, target)
    for key in sorted(fresh):
        with atomic_path(picture_path(target, key)) as temporary:
            shutil.copyfile(picture_path(source, key), temporary)
    return fresh


def _whole(keys: Sequence[str], folder: Path) -> set[str]:
    """Returns the pictures that a folder has and that can be read."""
    there = [key for key in keys if picture_path(folder, key).is_file()]
    damaged = [key for key in there if not is_whole(picture_path(folder, key))]
    if damaged:
        names = name_some([picture_path(folder, key).name for key in damaged])
        logger.warning("%d pictures of %s are damaged, so they do not count: %s", len(damaged), folder, names)
    return {*there} - {*damaged}
