"""Images are named by what they show, and drawn once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lora_diffusion.core.samples import Output, Request
from lora_diffusion.evaluation import sampling
from lora_diffusion.evaluation.sampling import CHUNK, Chunk, generate_missing, image_key, lay_out, look

REQUEST = Request("a cat", 3, "blur", 20, 5.0, (64, 64))
LOOKS = {"base": (), "a@0.0": look([("x", 0.0)]), "a@1.0": look([("x", 1.0)])}
REQUESTS = {(case, seed): Request(f"prompt {case}", seed, guidance=5.0) for case in range(5) for seed in range(4)}


class Pen:
    """Draws the seed as a grey; stops after some chunks as a process that is killed."""

    def __init__(self, num_chunks: int = 99) -> None:
        self.left = num_chunks
        self.drawn: list[tuple[str, str, int]] = []

    def __call__(self, candidate: str, requests: Sequence[Request]) -> list[Output]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.drawn += [(candidate, request.prompt, request.seed) for request in requests]
        return [Output(r, Image.new("RGB", (8, 8), (r.seed * 9, len(candidate), int(r.prompt[-1])))) for r in requests]


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


def _flipped(data: bytes) -> bytes:
    return data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]


@pytest.fixture
def chunks() -> Sequence[Chunk]:
    return lay_out("base key", LOOKS, REQUESTS).chunks


def test_the_name_covers_all_that_a_image_depends_on() -> None:
    name = image_key("base key", (("x", 0.5),), REQUEST)
    changes = [{"prompt": "a dog"}, {"seed": 4}, {"negative": ""}, {"num_steps": 21}, {"guidance": 4.0}, {"size": None}]
    others = [image_key("base key", (("x", 0.5),), replace(REQUEST, **change)) for change in changes]
    others += [image_key("other", (("x", 0.5),), REQUEST), image_key("base key", (("x", 0.6),), REQUEST)]
    others += [image_key("base key", (("y", 0.5),), REQUEST), image_key("base key", (), REQUEST)]
    assert len({name, *others}) == 1 + len(others)
    assert name == image_key("base key", (("x", 0.5),), replace(REQUEST, guidance=5))  # type: ignore[arg-type]
    unguided = replace(REQUEST, guidance=1.0)
    assert image_key("k", (), unguided) == image_key("k", (), replace(unguided, negative=""))
    assert look([("x", 0.5), ("y", 0.0), ("a", 1)]) == look([("a", 1), ("x", 0.5)]) == (("a", 1), ("x", 0.5))
    assert len(look([("x", 0.5), ("x", 0.5)])) == 2


def test_places_that_look_alike_share_a_image() -> None:
    sheet = lay_out("base key", LOOKS, REQUESTS)
    assert len(sheet.keys) == 3 * 20
    assert len(set(sheet.keys.values())) == 2 * 20
    assert sheet.keys["a@0.0", 2, 1] == sheet.keys["base", 2, 1]
    assert {chunk.candidate for chunk in sheet.chunks} == {"base", "a@1.0"}
    assert {len(chunk.requests) for chunk in sheet.chunks} == {5}
    many = {(case, 3): Request(f"prompt {case}", 3, guidance=5.0) for case in range(2 * CHUNK + 1)}
    assert [len(chunk.requests) for chunk in lay_out("base key", {"base": ()}, many).chunks] == [CHUNK, CHUNK, 1]


def test_another_seed_draws_its_own_images_only(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    first = {place: request for place, request in REQUESTS.items() if place[1] != 2}
    generate_missing(lay_out("base key", LOOKS, first).chunks, one, None, Pen())
    pen = Pen()
    generate_missing(lay_out("base key", LOOKS, REQUESTS).chunks, one, None, pen)
    assert {seed for _, _, seed in pen.drawn} == {2}
    assert len(pen.drawn) == 2 * 5
    generate_missing(lay_out("base key", LOOKS, REQUESTS).chunks, two, None, Pen())
    assert _content(one) == _content(two)


@pytest.mark.parametrize("damage", [lambda data: data[:-12], lambda data: data[:40], lambda data: b"", _flipped])
def test_damaged_images_are_drawn_again(
    chunks: Sequence[Chunk], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    generate_missing(chunks, one, cache, Pen())
    whole = _content(one)
    name = sampling.image_path(one, next(iter(chunks[0].requests))).name
    (one / name).write_bytes(damage(whole[name]))
    assert generate_missing(chunks, one, cache, Pen(0)) == 0  # the cache has it
    assert _content(one) == whole
    (cache / name).write_bytes(damage(whole[name]))
    pen = Pen()
    assert generate_missing(chunks, two, cache, pen) == 1
    assert len(pen.drawn) == len(chunks[0].requests)
    assert _content(two) == _content(cache) == whole


def test_stopped_and_continued_equals_uninterrupted(chunks: Sequence[Chunk], tmp_path: Path) -> None:
    calm = Pen()
    assert generate_missing(chunks, tmp_path / "calm", None, calm) == len(calm.drawn) == 40
    first, second = Pen(2), Pen()
    with pytest.raises(KeyboardInterrupt):
        generate_missing(chunks, tmp_path / "stopped", None, first)
    assert generate_missing(chunks, tmp_path / "stopped", None, second) == 40 - len(first.drawn)
    assert set(first.drawn).isdisjoint(second.drawn)
    assert _content(tmp_path / "stopped") == _content(tmp_path / "calm")
    assert generate_missing(chunks, tmp_path / "stopped", None, Pen(0)) == 0


def test_a_chunk_is_drawn_as_a_whole_and_what_is_there_is_kept(chunks: Sequence[Chunk], tmp_path: Path) -> None:
    generate_missing(chunks, tmp_path, None, Pen())
    before = _content(tmp_path)
    lost = sampling.image_path(tmp_path, next(iter(chunks[1].requests)))
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    pen = Pen()
    assert generate_missing(chunks, tmp_path, None, pen) == 1
    assert [(prompt, seed) for _, prompt, seed in pen.drawn] == [
        (request.prompt, request.seed) for request in chunks[1].requests.values()
    ]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert _content(tmp_path) == before


def test_processes_share_the_chunks(chunks: Sequence[Chunk], tmp_path: Path) -> None:
    generate_missing(chunks, tmp_path / "one", None, Pen())
    pens = [Pen(), Pen()]
    for index, pen in enumerate(pens):
        generate_missing(chunks, tmp_path / "two", None, pen, (index, 2))
    assert set(pens[0].drawn).isdisjoint(pens[1].drawn)
    assert _content(tmp_path / "one") == _content(tmp_path / "two")


def test_evaluations_share_a_cache(chunks: Sequence[Chunk], tmp_path: Path) -> None:
    generate_missing(chunks[:2], tmp_path / "one", tmp_path / "cache", Pen())
    pen = Pen()
    generate_missing(chunks, tmp_path / "two", tmp_path / "cache", pen)
    assert len(pen.drawn) == 40 - sum(len(chunk.requests) for chunk in chunks[:2])
    assert _content(tmp_path / "cache") == _content(tmp_path / "two")


def test_images_tell_their_settings(tmp_path: Path) -> None:
    (chunk,) = lay_out("k", {"base": ()}, {(0, 7): Request("prompt 0", 7, guidance=5.0)}).chunks
    generate_missing([chunk], tmp_path, None, Pen())
    (path,) = tmp_path.iterdir()
    assert Image.open(path).text["parameters"].startswith("prompt 0\nSteps: 25")  # type: ignore[attr-defined]
