from __future__ import annotations

from dataclasses import replace

import pytest

from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.files import builtin_path
from lora_diffusion.data import image_folder
from tests.data.conftest import INFO, Dataset

LONG = ", ".join(f"tag number {index}" for index in range(60))
CLIP = ClipTextLimit()
EMOJI = ClipTextLimit(builtin_path("emoji-sd") / "tokenizer")


def _read(dataset: Dataset, limit: ClipTextLimit = CLIP, **settings: object) -> None:
    image_folder.read(dataset.config(**settings), replace(INFO, text_limit=limit))


def test_what_is_beyond_the_text_encoder_is_told(dataset, caplog):
    dataset.image("0.png", f"zorg style, {LONG}")
    dataset.image("1.png", "zorg style cat")
    _read(dataset)
    assert "longer than the 75 tokens that the text encoder reads: 1 (0.png has 293)" in caplog.text


def test_a_trigger_that_is_cut_off_is_an_error(dataset):
    dataset.image("0.png", f"{LONG}, zorg style")
    dataset.image("1.png", "cat, zorg style")
    with pytest.raises(DataError) as caught:
        _read(dataset)
    (error,) = caught.value.errors
    assert error.startswith('0.png: the trigger "zorg style" stands behind the 75 tokens')
    with pytest.raises(DataError, match="stands behind the 75 tokens"):
        _read(dataset, trigger="zorg")
    _read(dataset, trigger="")


def test_each_base_has_its_own_limit(dataset, caplog):
    text = "zorg style " + "a cat and a dog " * 5
    dataset.image("0.png", text)
    _read(dataset)
    assert "tokens" not in caplog.text
    _read(dataset, EMOJI)
    assert "longer than the 22 tokens" in caplog.text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("zorg {red|blue} cat", "wildcards"),
        ("zorg __animal__ here", "wildcards"),
        ("(zorg:1.2) cat", "weights"),
        ("((zorg)) cat", "weights"),
        ("zorg <lora:other:0.8>", "adapters or embeddings"),
        ("zorg BREAK cat", "BREAK"),
        (r"zorg \(artist\)", "brackets with a backslash"),
        ("zorg cat --n bad hands --s 20", "options"),
    ],
)
def test_commands_to_other_programs_are_told(dataset, caplog, text, what):
    dataset.image("0.png", text)
    _read(dataset)
    (message,) = [record.getMessage() for record in caplog.records if "takes literally" in record.getMessage()]
    assert what in message and "1 (0.png)" in message


@pytest.mark.parametrize("text", ["zorg cat (red), blue", "zorg_cat, looking_at_viewer", "a zorg-like thing: red"])
def test_plain_captions_hold_no_commands(dataset, caplog, text):
    dataset.image("0.png", text)
    _read(dataset)
    assert "literally" not in caplog.text


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("zorg cat looking left", "say left or right"),
        ("zorg, looking_to_the_right", "say left or right"),
        ("zorg, die linke Hand", "say left or right"),
        ("zorg\uff0c看向左边", "say left or right"),
        ("zorg with a logo", "speak of writing"),
        ("a bright zorg", None),
    ],
)
def test_flip_with_captions_that_have_sides(dataset, caplog, text, what):
    dataset.image("0.png", text)
    _read(dataset)
    assert "data.flip" not in caplog.text
    _read(dataset, flip=True)
    assert ("data.flip=true" in caplog.text) == (what is not None)
    assert what is None or what in caplog.text


def test_a_trigger_that_may_be_another_one_is_told(dataset, caplog):
    dataset.image("0.png", "1girl, solo, red hair")
    dataset.image("1.png", "solo, 1girl")
    assert dataset.read()[0].trigger == ""
    assert 'All captions share "1girl", "solo", but these are common words' in caplog.text
    dataset.text("0.txt", "1girl, zorgchan")
    dataset.text("1.txt", "zorgchan, 1girl")
    assert dataset.read()[0].trigger == "zorgchan"
    assert 'All captions also share "1girl"' in caplog.text
    dataset.text("0.txt", "zorgchan, blorpy")
    dataset.text("1.txt", "blorpy, zorgchan")
    assert dataset.read()[0].trigger == "zorgchan, blorpy"
    assert 'several rare words, which are taken for the trigger together: "zorgchan", "blorpy"' in caplog.text
    for index in range(4):
        dataset.image(f"{index}.png", f"zorg {index}" if index else "dog")
    assert dataset.read()[0].trigger == ""
    assert 'Most captions hold "zorg", but not those of 1 image(s) (0.png)' in caplog.text


def test_a_trigger_that_no_caption_has_is_one_error(dataset):
    for index in range(5):
        dataset.image(f"{index}.png", f"a cat {index}")
    with pytest.raises(DataError) as caught:
        dataset.read(trigger="zorg")
    (error,) = caught.value.errors
    assert 'data.trigger="zorg" is in none of the 5 captions, such as "a cat 0"' in error


def test_a_trigger_of_several_tags_may_stand_apart(dataset):
    dataset.image("0.png", "zorgchan, red hair, blorpy")
    dataset.image("1.png", "blorpy, zorgchan")
    samples = dataset.read(trigger="zorgchan, blorpy")
    assert {sample.trigger for sample in samples} == {"zorgchan, blorpy"}
    assert [sample.prior_captions[0] for sample in samples] == ["red hair", ""]
    with pytest.raises(DataError, match=r'1\.png: data\.trigger="zorgchan, red" is not in its caption'):
        dataset.read(trigger="zorgchan, red")


def test_a_trigger_of_signs_alone(dataset):
    dataset.image("0.png", "a cat --")
    assert dataset.read(trigger="--")[0].prior_captions[0] == "a cat"
    with pytest.raises(DataError, match="is not in its caption"):
        dataset.read(trigger="___")
