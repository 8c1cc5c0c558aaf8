from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.config.schema import ImageDataConfig
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.data import image_folder
from lora_diffusion.data.image_folder import describe
from lora_diffusion.data.sample_types import IMAGES
from tests.data.conftest import INFO


def _errors(dataset, **settings) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        dataset.read(**settings)
    assert str(dataset.root) in str(caught.value)
    return caught.value.errors


def test_reads_folder_and_subfolders_sorted_without_hidden_ones(dataset):
    dataset.image("b.png", "a dog, zwx\n\n  a  big dog, zwx \n")
    dataset.image("sub/a.JPG", None)
    dataset.text("sub/a.caption", "\ufeffa cat, zwx")
    dataset.image(".thumbs/c.png")
    dataset.image("._b.png", None)
    samples = dataset.read(caption_lines="each")
    assert [sample.key for sample in samples] == ["b.png", "sub/a.JPG"]
    assert samples[0].captions == ("a dog, zwx", "a big dog, zwx")
    assert samples[1].captions == ("a cat, zwx",)
    assert [sample.trigger for sample in samples] == ["zwx", "zwx"]
    assert [sample.prior_captions[0] for sample in samples] == ["a dog", "a cat"]
    assert {(sample.size, sample.num_repeats, sample.pixels) for sample in samples} == {((64, 64), 1, None)}


def test_linked_folders_are_followed_once(dataset):
    dataset.image("real/a.png")
    (dataset.root / "loop").symlink_to(dataset.root)
    other = dataset.root.parent / "other"
    other.mkdir()
    (dataset.root / "real" / "a.png").rename(other / "a.png")
    (dataset.root / "real" / "a.txt").rename(other / "a.txt")
    (dataset.root / "linked").symlink_to(other)
    assert [sample.key for sample in dataset.read()] == ["linked/a.png"]


def test_links_that_lead_back(dataset):
    dataset.image("a/a.png")
    (dataset.root / "a" / "up").symlink_to(dataset.root)
    (dataset.root / "b").symlink_to(dataset.root / "a")
    dataset.image("x.png/y.png")
    assert [sample.key for sample in dataset.read()] == ["a/a.png", "x.png/y.png"]


def test_what_is_no_file_or_too_large_is_an_error(dataset):
    dataset.image("good.png")
    for name in ("pipe.png", "good.caption", "in/metadata.jsonl", "unrelated.log"):
        (dataset.root / name).parent.mkdir(exist_ok=True)
        os.mkfifo(dataset.root / name)
    dataset.text("pipe.txt", "a cat")
    dataset.image("large.png", "x" * 2**17)
    (dataset.root / "link.png").symlink_to("link.png")
    dataset.text("link.txt", "a cat")
    with (dataset.root / "in" / "huge.caption").open("wb") as stream:
        stream.truncate(5 * 2**30)
    dataset.image("in/huge.png", None)
    errors = _errors(dataset)
    expected = [
        ("pipe.png", "is a pipe and no file; move it away."),
        ("good.caption", "is a pipe and no file; move it away."),
        ("in/metadata.jsonl", "is a pipe and no file; move it away."),
        ("large.txt", "has 131,072 bytes, and at most 65,536 are read; cut or split it, or move it away."),
        ("in/huge.caption", "has 5,368,709,120 bytes, and at most 65,536 are read; cut or split it, or move it away."),
    ]
    for name, reason in expected:
        assert f"{name}: {reason}" in errors
    assert any(error.startswith("link.png: cannot be read") for error in errors)
    assert len(errors) == 6


def test_kohya_folders_give_repeats_and_captions(dataset):
    dataset.image("10_sks dog/a.png", None)
    dataset.image("10_sks dog/deep/b.png", "sks dog on a beach")
    dataset.image("2_cat/c.png", None)
    dataset.image("plain/d.png", "a cat")
    samples = dataset.read()
    assert [sample.num_repeats for sample in samples] == [10, 10, 2, 1]
    assert [sample.captions for sample in samples] == [("sks dog",), ("sks dog on a beach",), ("cat",), ("a cat",)]


def test_no_repeats_is_an_error(dataset):
    dataset.image("0_dog/a.png")
    assert _errors(dataset) == ("0_dog: asks for 0 repeats; rename the folder to 1_... or move it away.",)


def test_metadata_jsonl(dataset):
    dataset.image("train/a.png", None)
    dataset.image("train/b.png", None)
    lines = [{"file_name": "a.png", "text": "a cat"}, {"file_name": "b.png", "caption": ["a dog", "one dog"]}]
    dataset.text("train/metadata.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    assert [sample.captions for sample in dataset.read()] == [("a cat",), ("a dog", "one dog")]


def test_every_error_is_listed_at_once(dataset):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    dataset.image("good.png")
    for name, file_format in (("cut.png", "png"), ("cut.jpg", "jpeg"), ("cut2.webp", "webp")):
        noise.save(dataset.root / name, file_format)
        whole = (dataset.root / name).read_bytes()
        dataset.text(name, whole[: len(whole) // 2])
    dataset.text("cut.txt", "a cat")
    dataset.text("cut2.txt", "a cat")
    dataset.text("zero.png", b"")
    dataset.text("zero.txt", "a cat")
    dataset.text("letter.png", "dear reader")
    dataset.text("letter.txt", "a cat")
    dataset.image("latin.png", None)
    dataset.text("latin.txt", "a cat\ncaf\xe9".encode("latin-1"))
    dataset.image("wide.png", None)
    dataset.text("wide.txt", "a cat".encode("utf-16-le"))
    dataset.image("empty.png", " \n\n")
    dataset.image("none.png", None)
    dataset.image("near.png", None)
    dataset.text("near.captions", "a cat")
    dataset.image("two.png", "a cat")
    dataset.text("two.caption", "a dog")
    dataset.text(
        "metadata.jsonl",
        '{"file_name": "gone.png", "text": "a"}\n{oops\n{"text": "a"}\n{"file_name": "good.png"}\n'
        + "[" * 100_000
        + "\n"
        '{"file_name": "../images/good.png", "text": "x"}\n'
        r'{"file_name": "good.png", "text": "a cat \ud83d"}',
    )
    before = {path: path.read_bytes() for path in dataset.root.iterdir()}
    errors = _errors(dataset)
    expected = [
        ("cut.jpg", "truncated"),
        ("cut.png", "truncated"),
        ("cut2.webp", "cannot be decoded"),
        ("letter.png", "is no png, jpeg, webp, avif, tiff, bmp or gif image"),
        ("zero.png", "0 bytes"),
        ("latin.txt", "byte 0xe9 at position 9 (line 2) is not UTF-8"),
        ("wide.txt", "NUL"),
        ("empty.png", "its caption is empty"),
        ("none.png", "has no caption; write none.txt"),
        ("near.png", "has no caption; rename near.captions to near.txt"),
        ("two.png", "two.caption and two.txt give it different captions"),
        ("metadata.jsonl, line 1", "no image gone.png"),
        ("metadata.jsonl, line 2", "is not JSON"),
        ("metadata.jsonl, line 3", "file_name"),
        ("metadata.jsonl, line 4", '"text" or "caption"'),
        ("metadata.jsonl, line 5", "brackets in brackets"),
        ("metadata.jsonl, line 7", "half a character"),
        ("metadata.jsonl, line 6", "no image ../images/good.png"),
    ]
    for name, reason in expected:
        assert any(error.startswith(f"{name}: ") and reason in error for error in errors), (name, reason, errors)
    assert len(errors) == len(expected)
    assert before == {path: path.read_bytes() for path in dataset.root.iterdir()}


def test_a_decompression_bomb_is_refused(dataset, monkeypatch):
    dataset.image("bomb.png", size=(200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    (error,) = _errors(dataset)
    assert error.startswith("bomb.png: has too many pixels")


@pytest.mark.parametrize(
    ("path", "reason"), [("missing", "no such folder"), ("file.txt", "is a file"), ("empty", "but 1 .heic, 1 .txt")]
)
def test_folders_that_cannot_be_used(tmp_path, path, reason):
    (tmp_path / "file.txt").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.heic").touch()
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(DataError, match=reason):
        image_folder.read(ImageDataConfig(path=str(tmp_path / path)), INFO)


def test_without_any_caption_one_error_names_files_that_look_like_them(dataset):
    for name in ("a.png", "b.png", "c.png"):
        dataset.image(name, None)
    dataset.text("a.cap", "a cat")
    dataset.text("b.png.txt", "a dog")
    (error,) = _errors(dataset)
    assert "None of the 3 images has a caption" in error
    assert "a.cap, b.png.txt" in error and "data.captions=optional" in error


def test_names_match_however_their_accents_are_written(dataset):
    apart, together = "gru\u0308n", "gr\u00fcn"
    dataset.image(f"{apart}.png", None)
    dataset.text(f"{together}.txt", "a green cat")
    dataset.image("sub/" + together + ".png", None)
    dataset.text("sub/metadata.jsonl", json.dumps({"file_name": f"{apart}.png", "text": "a green dog"}))
    assert [sample.captions for sample in dataset.read()] == [("a green cat",), ("a green dog",)]


def test_a_year_before_the_name_of_a_folder_is_pointed_out(dataset, caplog):
    dataset.image("2024_holiday/a.png", None)
    dataset.image("100_dog/b.png", None)
    assert [sample.num_repeats for sample in dataset.read()] == [100, 2024]
    assert "rename folder 2024_holiday if" in caplog.text
    assert "rename folder 100_dog" not in caplog.text


def test_optional_captions_take_the_default(dataset):
    dataset.image("a.png", None)
    dataset.image("b.png", "zwx cat")
    dataset.image("c.png", "zwx dog")
    dataset.image("d.png", "")
    samples = dataset.read(captions="optional")
    assert [sample.captions[0] for sample in samples] == ["", "zwx cat", "zwx dog", ""]
    assert [sample.prior_captions[:1] for sample in samples] == [(), ("cat",), ("dog",), ()]
    samples = dataset.read(captions="optional", default_caption="a  zwx thing")
    assert samples[0].captions == ("a zwx thing",)


def test_skip_bad_leaves_out_unreadable_images_with_one_warning(dataset, caplog):
    dataset.image("a.png")
    dataset.text("b.png", b"")
    dataset.text("c.png", b"text")
    samples = dataset.read(skip_bad=True)
    assert [sample.key for sample in samples] == ["a.png"]
    assert [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()] == [
        "Left out images that cannot be read: 2 (b.png, c.png)."
    ]


def test_skip_bad_with_nothing_left_is_an_error(dataset):
    dataset.text("b.png", b"")
    assert any("0 bytes" in error for error in _errors(dataset, skip_bad=True))


def test_warnings_name_files_that_are_not_used(dataset, caplog):
    dataset.image("a.png")
    dataset.image("a.jpg", None)
    dataset.text("gone.txt", "a dog")
    dataset.text("photo.heic", b"x")
    dataset.image("small.png", size=(10, 10))
    assert len(dataset.read()) == 3
    text = caplog.text
    assert "Caption files that belong to none of the images, not used: 1 (gone.txt)" in text
    assert "share a name, and with it a caption file: 1 (a.jpg and a.png)" in text
    assert "format that is not read: 1 (photo.heic)" in text
    assert "scaled up: 1 (small.png)" in text


def test_a_fixed_trigger_must_be_in_every_caption(dataset):
    dataset.image("a.png", "a Blob style cat\na cat")
    dataset.image("b.png", "a dog, blob style")
    (error,) = _errors(dataset, trigger="blob style", caption_lines="each")
    assert error.startswith('a.png: data.trigger="blob style" is not in its caption "a cat"')
    samples = dataset.read(trigger="")
    assert {(sample.trigger, sample.prior_captions) for sample in samples} == {("", ())}


def test_one_image_has_a_trigger_only_if_it_is_given(dataset):
    dataset.image("a.png", "a zwx cat\na zwx animal")
    assert dataset.read()[0].prior_captions == ()
    assert dataset.read(trigger="zwx", caption_lines="each")[0].prior_captions[0] == "a cat"


def test_buckets_keep_the_shape_and_squares_do_not(dataset):
    dataset.image("wide.png", size=(200, 100))
    dataset.image("tall.png", size=(100, 200))
    # 88x40 (2.2) is nearer to 2 on a log scale than 80x48 (1.67) and than 96x40 (2.4)
    assert [sample.size for sample in dataset.read()] == [(40, 88), (88, 40)]
    assert {sample.size for sample in dataset.read(buckets=False, resolution=32)} == {(32, 32)}
    with pytest.raises(ConfigError, match=r"data\.captions=perhaps"):
        dataset.read(captions="perhaps")


def test_rotated_photos_get_the_bucket_of_their_upright_shape(dataset):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(dataset.root / "a.jpg", exif=exif)
    dataset.text("a.txt", "a cat")
    assert dataset.read()[0].size == (40, 88)


def test_reading_does_not_import_torch(dataset):
    dataset.image("a.png")
    code = (
        "import sys\n"
        "from lora_diffusion.config.schema import ImageDataConfig\n"
        "from lora_diffusion.core.base_model import BaseInfo\n"
        "from lora_diffusion.data import batches, cache, image_folder\n"
        "samples = image_folder.read(ImageDataConfig(path=sys.argv[1]), BaseInfo(64, 8, '', 'epsilon', ''))\n"
        "image_folder.describe(samples)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(dataset.root)], check=True)


def test_report(dataset):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    smooth = noise.resize((4, 4)).resize((64, 64))
    smooth.save(dataset.root / "a.png")
    smooth.save(dataset.root / "near.jpg", quality=90)
    (dataset.root / "same.png").write_bytes((dataset.root / "a.png").read_bytes())
    dataset.image("3_dog/wide.png", "a small dog in zwx style", size=(200, 100))
    for name in ("a", "near", "same"):
        dataset.text(f"{name}.txt", "a cat, zwx")
    report = describe(dataset.read())
    assert (report.num_pictures, report.num_shown, report.num_captions) == (4, 6, 4)
    assert report.trigger == "zwx"
    *texts, other = report.prior_example
    assert texts == ["a small dog in zwx style", "a small dog in style"]
    assert re.fullmatch("a small dog in (?!zwx)[a-z]+ style", other)
    assert report.buckets == {"64x64": 3, "88x40": 1}
    assert report.largest_crop[0] == "3_dog/wide.png" and 0 < report.largest_crop[1] < 0.1
    assert report.num_upscaled == 0
    assert report.duplicates == (("a.png", "same.png"),)
    assert report.near_duplicates == (("a.png", "near.jpg"), ("near.jpg", "same.png"))
    assert report.longest_caption == ("3_dog/wide.png", 6)
    text = "\n".join(report.lines())
    assert "64x64 (3), 88x40 (1)" in text and "a.png = same.png" in text and "near.jpg ~ same.png" in text
    json.dumps(report.__dict__)


@pytest.mark.parametrize(
    ("rule", "captions", "word"),
    [
        ("joined", ("zorg style cat. It sits. The light is warm.",), "its lines joined"),
        ("each", ("zorg style cat.", "It sits.", "The light is warm."), "each line is a caption of its own"),
        ("first", ("zorg style cat.",), "only the first line"),
    ],
)
def test_captions_of_several_lines(dataset, caplog, rule, captions, word):
    caplog.set_level("INFO")
    text = "zorg style cat.\n\nIt sits.\r\nThe light is warm.\n"
    dataset.image("a.png", text)
    dataset.image("b.png", None)
    dataset.text("b.caption", text)
    dataset.image("c.png", None)
    dataset.image("d.png", "zorg style dog\n")
    dataset.text("metadata.jsonl", json.dumps({"file_name": "c.png", "text": ["one", text]}))
    captions_read = [sample.captions for sample in dataset.read(caption_lines=rule)]
    of_table = ("one", captions[0] if rule == "first" else " ".join(captions))
    assert captions_read == [captions, captions, of_table, ("zorg style dog",)]
    assert "Captions of several lines: 3 (" in caplog.text and word in caplog.text


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("metadata.csv", 'file_name,text\na.png,zorg style cat\nsub\\b.png,"zorg style dog, red"\n'),
        (
            "metadata.csv",
            '\ufefflabel,caption,file_name\r\n0,zorg style cat,a.png\r\n1,"zorg style dog, red",sub/b.png\r\n',
        ),
        ("metadata.tsv", "file_name\ttext\na.png\tzorg style cat\nsub/b.png\tzorg style dog, red\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "zorg style cat"}\n'
            '{"file_name": "sub\\\\b.png", "text": "zorg style dog, red"}\n',
        ),
    ],
)
def test_tables_of_images(dataset, name, table):
    dataset.image("a.png", None)
    dataset.image("sub/b.png", None)
    dataset.text(name, table)
    assert [sample.captions for sample in dataset.read()] == [("zorg style cat",), ("zorg style dog, red",)]


def test_errors_of_tables_of_images(dataset):
    dataset.image("a.png", None)
    dataset.image("b.png", None)
    dataset.text("metadata.csv", "file_name,text\na.png,zorg, red\ngone.png,zorg\n,zorg\nb.png,\n")
    dataset.image("sub/c.png", "a cat")
    dataset.text("sub/metadata.csv", "file;text\nc.png;zorg\n")
    dataset.image("other/d.png", "a cat")
    dataset.text("other/metadata.csv", "file_name,label\nd.png,3\n")
    expected = [
        ("metadata.csv, line 2", "more columns than the header"),
        ("metadata.csv, line 3", "no image gone.png"),
        ("metadata.csv, line 4", "names no image"),
        ("sub/metadata.csv, line 2", 'needs a column "file_name", and has file;text'),
        ("other/metadata.csv, line 2", 'needs a column "text" or "caption", and has file_name, label'),
        ("a.png", "has no caption"),
        ("b.png", "its caption is empty"),
    ]
    errors = _errors(dataset)
    for name, reason in expected:
        assert any(error.startswith(f"{name}: ") and reason in error for error in errors), (name, reason, errors)
    assert len(errors) == len(expected)


@pytest.mark.parametrize("spelled", ["{}", "{}/", "{}/.", "{}/sub/..", "."])
def test_the_given_folder_counts_like_its_subfolders(dataset, monkeypatch, spelled):
    dataset.image("10_sks dog/a.png", None)
    dataset.image("10_sks dog/sub/b.png", "sks dog in the rain")
    dataset.image("10_sks dog/2_cat/c.png", None)
    monkeypatch.chdir(dataset.root / "10_sks dog")
    path = spelled.format(dataset.root / "10_sks dog")
    samples = image_folder.read(ImageDataConfig(path=path), INFO)
    assert [sample.num_repeats for sample in samples] == [2, 10, 10]
    assert [sample.captions[0] for sample in samples] == ["cat", "sks dog", "sks dog in the rain"]


@pytest.mark.parametrize(("link", "target"), [("5_zwx cat", "images"), ("mine", "5_zwx cat")])
def test_links_to_folders_with_repeats(dataset, link, target):
    dataset.image("a.png", None)
    dataset.root.rename(dataset.root.with_name(target))
    (path := dataset.root.with_name(link)).symlink_to(dataset.root.with_name(target))
    (sample,) = image_folder.read(ImageDataConfig(path=str(path)), INFO)
    assert (sample.num_repeats, sample.captions) == (5, ("zwx cat",))


def test_dates_are_no_repeats(dataset):
    dataset.image("20240115_holiday/a.png", "a cat")
    assert [sample.num_repeats for sample in dataset.read()] == [1]


def test_an_image_from_bytes_is_the_image_of_the_file(dataset):
    dataset.image("a.png", "a red sks cat", size=(80, 40))
    dataset.image("b.png", "a blue sks dog", color="blue")
    files, config = dataset.read(), dataset.config(flip=True)
    contents = {sample.key: sample.path.read_bytes() for sample in files}
    held = [
        replace(sample, path=Path("table") / sample.key, read_bytes=partial(contents.get, sample.key))
        for sample in files
    ]
    for one, other in zip(held, files, strict=True):
        assert IMAGES.identity(one, config) == IMAGES.identity(other, config)
        assert IMAGES.open(one, config).pixels.equal(IMAGES.open(other, config).pixels)
    assert IMAGES.describe(held) == IMAGES.describe(files)
