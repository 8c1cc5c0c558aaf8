from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load

from lora_diffusion.config.schema import CacheConfig
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.data import cache
from lora_diffusion.data.sample_types import Images

_UNET = frozenset({"unet"})


@pytest.fixture
def run(dataset, family, loaded, tmp_path):
    """Prepares the data set and returns the items, and the keys of the views that the family was asked for."""
    colors = {"a": "red", "b": "green", "c": "blue", "d": "white"}
    for index, (name, color) in enumerate(colors.items()):
        dataset.image(f"{name}.png", f"{name} zwx", color=color, size=(128, 64) if index == 3 else (64, 64))

    def call(flip=False, trained=_UNET, **settings):
        family.requested.clear()
        family.texts.clear()
        config = CacheConfig(path=str(tmp_path / "cache"))
        items = cache.prepare(family, loaded, dataset.read(**settings), trained, config, dataset.config(flip=flip))
        return items, [key for keys in family.requested for key in keys]

    return call


def _files(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_the_second_run_prepares_nothing_and_gives_the_same(run, family, tmp_path):
    first, requested = run()
    assert requested == ["a.png", "b.png", "c.png", "d.png"]
    assert [len(keys) for keys in family.requested] == [3, 1]
    assert [item.key for item in first] == requested
    assert [item.group for item in first] == ["64x64", "64x64", "64x64", "88x40"]
    assert first[0].tensors["mean"].tolist() == [[1, -1, -1]]
    second, requested = run()
    assert requested == []
    for old, new in zip(first, second, strict=True):
        assert (old.key, old.group, old.num_repeats) == (new.key, new.group, new.num_repeats)
        assert list(new.tensors) == list(old.tensors) and len(new.tensors) == 3
        assert all(torch.equal(old.tensors[name], new.tensors[name]) for name in old.tensors)
    assert "other" not in second[0].tensors
    assert all(len(path.relative_to(tmp_path / "cache").parts) == 3 for path in _files(tmp_path))


def test_a_changed_caption_image_or_size_prepares_just_that_piece_of_that_item(run, dataset, family):
    run()
    dataset.text("b.txt", "b zwx, changed")
    items, requested = run()
    assert (requested, family.texts) == ([], [["b.png"]])
    assert items[1].tensors["length"] == len("b zwx, changed")
    dataset.image("c.png", None, color="black")
    assert run()[1] == ["c.png"]
    assert run(buckets=False)[1] == ["d.png"]
    assert run(resolution=32)[1] == ["a.png", "b.png", "c.png", "d.png"]
    assert family.texts == []
    assert run()[1] == []


def test_flip_base_and_trained_parts_are_part_of_the_key(run, family):
    run()
    items, requested = run(flip=True)
    assert len(requested) == 4 and family.shapes[-1] == (1, 2, 3, 40, 88) and family.texts == []
    assert items[0].tensors["mean"].shape == (2, 3)
    assert run(trained=frozenset({"unet", "text_encoder"}))[1] == []
    assert len(family.texts) == 2
    family.version = "2"
    assert len(run()[1]) == 4 and len(family.texts) == 2


def test_names_and_repeats_are_not(run, dataset):
    run()
    (dataset.root / "5_x").mkdir()
    for ending in (".png", ".txt"):
        (dataset.root / f"a{ending}").rename(dataset.root / "5_x" / f"renamed{ending}")
    items, requested = run()
    assert requested == []
    assert (items[0].key, items[0].num_repeats) == ("5_x/renamed.png", 5)


def test_equal_images_and_equal_texts_are_prepared_once(run, dataset, family):
    dataset.image("a2.png", "other zwx", color="red")
    dataset.image("a3.png", "a zwx", color="red")
    dataset.image("b2.png", "a zwx", color="black")
    items, requested = run(trigger="")
    assert [item.key for item in items[:5]] == ["a.png", "a2.png", "a3.png", "b.png", "b2.png"]
    assert (len(requested), sum(map(len, family.texts))) == (5, 5)
    assert len({item.tensors["mean"].data_ptr() for item in items[:3]}) == 1
    assert [item.tensors["length"].item() for item in items[:5]] == [5, 9, 5, 5, 5]


def _flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def _with_header(content: bytes, change) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    return len(written).to_bytes(8, "little") + written + content[8 + length :]


def _swap_names(header) -> None:
    header["mean"], header["first_view"] = header["first_view"], header["mean"]


def _forget(header) -> None:
    del header["__metadata__"]["checksums"]


def _reshape(header) -> None:
    header["first_view"]["shape"] = [1, 3]


_DAMAGES = {
    "cut": lambda whole, other: whole[:-2],
    "empty": lambda whole, other: b"",
    "noise": lambda whole, other: b"\xff" * 100,
    "swapped": lambda whole, other: other,
    "bit of a tensor": lambda whole, other: _flipped(whole, len(whole) - 1),
    "bit of the header": lambda whole, other: _flipped(whole, 40),
    "names": lambda whole, other: _with_header(whole, _swap_names),
    "shape": lambda whole, other: _with_header(whole, _reshape),
    "no checksums": lambda whole, other: _with_header(whole, _forget),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("damage", _DAMAGES)
def test_a_damaged_file_is_made_again(run, family, tmp_path, caplog, monkeypatch, damage, in_memory):
    monkeypatch.setattr(cache, "_MEMORY_BYTES", 2**30 if in_memory else 0)
    before, _ = run()
    before = [replace(item, tensors=dict(item.tensors)) for item in before]
    path, other = [file for file in _files(tmp_path) if "mean" in load(file.read_bytes())][:2]
    whole = path.read_bytes()
    path.write_bytes(_DAMAGES[damage](whole, other.read_bytes()))
    items, requested = run()
    assert len(requested) == 1 and family.texts == []
    (line,) = [record.message for record in caplog.records if "made again" in record.message]
    assert line.startswith("1 cache file(s) are damaged") and str(path) in line
    for one, other in zip(before, items, strict=True):
        assert all(one.tensors[name].equal(other.tensors[name]) for name in ("mean", "first_view", "length"))
    caplog.clear()
    assert run()[1] == [] and not caplog.records


def test_many_damaged_files_are_told_of_once(run, tmp_path, caplog):
    run()
    for path in _files(tmp_path):
        path.write_bytes(_flipped(path.read_bytes(), path.stat().st_size - 1))
    assert len(run()[1]) == 4
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("8 cache file(s) are damaged")


def test_a_bit_that_flips_during_the_run_is_a_run_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MEMORY_BYTES", 0)
    items, _ = run()
    for path in _files(tmp_path):
        path.write_bytes(_flipped(path.read_bytes(), path.stat().st_size - 1))
    with pytest.raises(RunError, match=r"damaged during the run \(its checksum does not fit"):
        [items[0].tensors[name] for name in items[0].tensors]


def test_files_of_the_former_layout_are_left_alone(run, tmp_path):
    folder = tmp_path / "cache" / "aa" / "bb"
    folder.mkdir(parents=True)
    old = folder / f"aabb{'0' * 60}.safetensors"
    safetensors.torch.save_file({"mean": torch.zeros(1, 3)}, old, {"content": old.stem, "group": "64x64"})
    before = old.read_bytes()
    assert len(run()[1]) == 4 and old.read_bytes() == before


def test_small_caches_are_kept_in_memory(run, tmp_path):
    items, _ = run()
    for path in _files(tmp_path):
        path.unlink()
    assert all(len(item.tensors) == len(dict(item.tensors)) > 0 for item in items)


def test_a_file_lost_during_the_run_is_a_run_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MEMORY_BYTES", 0)
    items, _ = run()
    for path in _files(tmp_path):
        path.unlink()
    with pytest.raises(RunError, match="start the command again"):
        items[0].tensors["mean"]


def test_tensors_outlive_a_file_that_is_cut_off(run, tmp_path):
    tensor = run()[0][0].tensors["mean"]
    for path in _files(tmp_path):
        path.write_bytes(b"")
    assert tensor.tolist() == [[1, -1, -1]]


def test_a_failing_family_leaves_no_broken_file(run, family, tmp_path, monkeypatch):
    prepare = family.prepare

    def fail_on_wide(loaded, samples, trained, pieces):
        if samples[0].size != (64, 64):
            raise RuntimeError("out of memory")
        return prepare(loaded, samples, trained, pieces)

    monkeypatch.setattr(family, "prepare", fail_on_wide)
    with pytest.raises(RuntimeError):
        run()
    monkeypatch.undo()
    assert len(_files(tmp_path)) == 3
    assert run()[1] == ["d.png"]


def test_a_cache_that_cannot_be_written(dataset, family, loaded, tmp_path):
    dataset.image("a.png")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cache\.path"):
        cache.prepare(family, loaded, dataset.read(), _UNET, CacheConfig(path=str(tmp_path / "file")), dataset.config())


def test_batches_stay_below_the_pixel_limit(dataset, family, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(Images, "_BATCH_PIXELS", 2 * 64 * 64)
    for index in range(5):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(dataset.root / f"{index}.png")
    samples = [replace(sample) for sample in dataset.read(captions="optional")]
    config = CacheConfig(path=str(tmp_path / "cache"))
    cache.prepare(family, loaded, samples, _UNET, config, dataset.config())
    assert [shape[:2] for shape in family.shapes] == [(2, 1), (2, 1), (1, 1)]
    family.shapes.clear()
    cache.prepare(family, loaded, samples, _UNET, config, dataset.config(flip=True))
    assert [shape[:2] for shape in family.shapes] == [(1, 2)] * 5


def test_a_full_disk_is_said_in_one_line(run, monkeypatch):
    def fail(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(ConfigError, match=r"cache\.path.*No space left on device.*free space"):
        run()


def test_what_a_killed_process_left_is_removed(run, tmp_path):
    run()
    path = _files(tmp_path)[0]
    left = path.with_name(".part-1234-x")
    path.rename(left)
    os.utime(left, (0, 0))
    run()
    assert path.is_file() and not left.exists()
