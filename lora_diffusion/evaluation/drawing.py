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
from lora_diffusion.core.types import Output, Request
from lora_diffusion.evaluation.pictures import save_drawn

_VERSION = 1
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

    What a chunk holds depends on the evaluation only, never on what is there already or on who draws it: a picture has
    the same bits whether it is drawn at once, after a stop, or by another process.

    Args:
        base_key: names the base's weights, number type and device.
        looks: candidate -> its adapters.
        requests: (index of the case, seed) -> what to draw, without adapter weights.
    """
    keys: dict[Place, str] = {}
    chunks: list[Chunk] = []
    known: set[str] = set()
    for candidate, own in looks.items():
        fresh: dict[str, Request] = {}
        for (case, seed), request in requests.items():
            key = picture_key(base_key, own, request)
            keys[candidate, case, seed] = key
            if key not in known:
                known.add(key)
                fresh[key] = request
        names = list(fresh)
        chunks += [
            Chunk(candidate, {key: fresh[key] for key in names[start : start + CHUNK]})
            for start in range(0, len(names), CHUNK)
        ]
    return Sheet(keys, chunks)


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

    A chunk that lacks a picture is drawn as a whole; those of its pictures that are there are kept.

    Args:
        chunks: of `lay_out`.
        folder: gets all pictures.
        cache: folder that evaluations share, which gets them too; None for none.
        draw: draws a chunk.
        share: (index, number) of this process; it takes care of every number-th chunk.
    """
    index, num_shares = share
    own = chunks[index::num_shares]
    if cache is not None:
        _copy([key for chunk in own for key in chunk.requests], cache, folder)
    missing = [chunk for chunk in own if not all(picture_path(folder, key).is_file() for key in chunk.requests)]
    total, there = sum(len(chunk.requests) for chunk in own), sum(len(chunk.requests) for chunk in missing)
    logger.info("Drawing %d of %d pictures; the others are there.", there, total)
    num_written = 0
    for chunk in missing:
        outputs = draw(chunk.candidate, list(chunk.requests.values()))
        for key, output in zip(chunk.requests, outputs, strict=True):
            path = picture_path(folder, key)
            if not path.is_file():
                save_drawn(output, path)
                num_written += 1
        if cache is not None:
            _copy(list(chunk.requests), folder, cache)
        logger.info("Drawn: %s, %d pictures", chunk.candidate, len(chunk.requests))
    return num_written


def _copy(keys: Sequence[str], source: Path, target: Path) -> None:
    """Copies those pictures that the source has and the target lacks."""
    for key in keys:
        here, there = picture_path(source, key), picture_path(target, key)
        if here.is_file() and not there.is_file():
            with atomic_path(there) as temporary:
                shutil.copyfile(here, temporary)
