"""Conversations about images, in the layouts that people have, and all that can be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_diffusion.config.schema import ChatDataConfig, PreviewConfig
from lora_diffusion.core.base_model import ChatInfo
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.samples import Chat, Turn
from lora_diffusion.data.chats import questions
from lora_diffusion.data.sample_types import CHATS
from tests.tiny_llava import entry, write_chats, write_picture

_IMAGE_TOKENS = 4


def _count(samples: Sequence[Chat]) -> list[int | str]:
    return [_IMAGE_TOKENS + sum(len(turn.text.split()) for turn in sample.turns) for sample in samples]


INFO = ChatInfo(source="tiny base", max_tokens=40, count_tokens=_count)
TURNS = (Turn("user", "What is it?", 1), Turn("assistant", "a cat"))
LAYOUTS = {
    "LLaVA": {"image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}]},
    "image behind the text": {"image": "a.png", "conversations": [
        {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "a cat"}]},
    "ShareGPT": {"images": ["a.png"], "conversations": [
        {"from": "user", "value": "<image>What is it?"}, {"from": "assistant", "value": "a cat"}]},
    "messages": {"image": "a.png", "messages": [
        {"role": "user", "content": "<image> What is it?"}, {"role": "assistant", "content": "a cat"}]},
    "parts and the same image above": {"image": "a.png", "messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "a cat"}]},
    "parts": {"messages": [
        {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]},
}  # fmt: skip


def _read(path: Path, **settings: Any) -> list[Chat]:
    return CHATS.read(ChatDataConfig(path=str(path), **settings), INFO)


class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("ending", ["json", "jsonl"])
    def test_one_meaning(self, tmp_path: Path, layout: str, ending: str) -> None:
        write_picture(tmp_path / "a.png", size=(30, 20))
        text = json.dumps(LAYOUTS[layout] if ending == "jsonl" else [LAYOUTS[layout]])
        (tmp_path / f"chats.{ending}").write_text(text, encoding="utf-8")
        for path in (tmp_path, tmp_path / f"chats.{ending}"):
            (sample,) = _read(path)
            assert sample.turns == TURNS
            assert (sample.path, sample.images[0].size, sample.num_tokens, sample.group) == (
                tmp_path / "a.png",
                (30, 20),
                _IMAGE_TOKENS + 5,
                "32",
            )

    def test_separators_of_unicode_do_not_end_a_line_of_json(self, tmp_path: Path) -> None:
        write_picture(tmp_path / "a.png")
        line = json.dumps(entry("a.png", "What\u2028is\u2029it?", "a\x85cat"), ensure_ascii=False)
        (tmp_path / "chats.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8")
        samples = _read(tmp_path)
        assert [sample.key for sample in samples] == ["chats.jsonl, line 1", "chats.jsonl, line 2"]
        assert samples[0].turns[1].text == "a\x85cat"

    @pytest.mark.parametrize("is_list", [False, True])
    def test_saved_data_set(self, tmp_path: Path, is_list: bool) -> None:
        datasets = pytest.importorskip("datasets")
        image = str(write_picture(tmp_path / "a.png", size=(30, 20)))
        feature = datasets.Image()
        name, cell = ("images", [image]) if is_list else ("image", image)
        messages = LAYOUTS["messages"]["messages"]
        table = datasets.Dataset.from_dict({name: [cell, cell], "messages": [messages, messages]})
        table.cast_column(name, datasets.List(feature) if is_list else feature).save_to_disk(tmp_path / "saved")
        samples = _read(tmp_path / "saved")
        assert [sample.key for sample in samples] == ["row 0", "row 1"]
        assert samples[0].turns == TURNS
        assert CHATS.open(samples[1], ChatDataConfig()).views[0][0].size == (30, 20)
        assert CHATS.identity(samples[0], ChatDataConfig()) == CHATS.identity(samples[1], ChatDataConfig())

    def test_names_that_windows_wrote(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        write_picture(tmp_path / "sub" / "a.png")
        (tmp_path / "chats.json").write_text(json.dumps([entry("sub\\a.png", "What?", "a cat")]), encoding="utf-8")
        assert _read(tmp_path)[0].path == tmp_path / "sub" / "a.png"

    def test_images_in_another_folder(self, tmp_path: Path) -> None:
        write_picture(tmp_path / "images" / "a.png")
        path = write_chats(tmp_path / "texts", [LAYOUTS["LLaVA"]])
        assert len(_read(path, images=str(tmp_path / "images"))) == 1


def _faulty(first: str, *rest: str) -> dict[str, Any]:
    conversation = entry("a.png", first, *rest)
    conversation["conversations"][0]["value"] = first
    return conversation


ERRORS: dict[str, tuple[Any, str]] = {
    "no image token": (_faulty("What?", "a cat"), "has no <image> in any turn"),
    "two image tokens": (_faulty("<image><image>What?", "a cat"), "has 2 times <image>"),
    "image token in an answer": (_faulty("What?", "<image>a cat"), "has <image> in turn 2, which is the assistant's"),
    "missing image": (entry("b.png", "What?", "a cat"), "there is no image b.png"),
    "name too long": (entry("b" * 5000, "What?", "a cat"), f"there is no image {'b' * 100}... (5000 characters)"),
    "image inside the file": (
        entry("data:image/png;base64," + "A" * 5000, "What?", "a cat"),
        "images inside the file are not read",
    ),
    "no image named": ({"conversations": LAYOUTS["LLaVA"]["conversations"]}, "names no image"),
    "two images": ({**LAYOUTS["ShareGPT"], "images": ["a.png", "a.png"]}, "names 2 images"),
    "two images, one in a part": (
        {**LAYOUTS["parts"], "image": "b.png"},
        "names 2 images",
    ),
    "an image as OpenAI writes it": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]},
                {"role": "assistant", "content": "a cat"},
            ]
        },
        "turn 1 holds a part of type 'image_url' and without a text, which is not read; write an image as",
    ),
    "two questions": (
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>a"}, {"from": "human", "value": "b"}]},
        "turn 2 is the user's, where the assistant's is due",
    ),
    "the same question twice": (
        {"image": "a.png", "conversations": [{"from": "human", "value": "<image>a"}] * 2},
        "turn 2 is the user's, where the assistant's is due",
    ),
    "two answers after a system turn": (
        {
            "image": "a.png",
            "conversations": [
                {"from": "system", "value": "be short"},
                {"from": "human", "value": "<image>a"},
                *[{"from": "gpt", "value": "b"}] * 2,
            ],
        },
        "turn 4 is the assistant's, where the user's is due",
    ),
    "answer first": (
        {"image": "a.png", "conversations": [{"from": "gpt", "value": "<image>a"}, {"from": "human", "value": "b"}]},
        "turn 1 is the assistant's, where the user's is due",
    ),
    "unknown role": (
        {"image": "a.png", "conversations": [{"from": "tool", "value": "<image>a"}]},
        "turn 1 is said by 'tool'",
    ),
    "no answer": (entry("a.png", "What?"), "ends without an answer"),
    "empty answer": (entry("a.png", "What?", " \n"), "has an empty answer (turn 2)"),
    "no turns": ({"image": "a.png"}, "has no list of turns"),
    "no object": ("text", "is no object"),
    "corrupt image": (entry("broken.png", "What?", "a cat"), "its image broken.png cannot be decoded"),
    "empty image": (entry("empty.png", "What?", "a cat"), "its image empty.png is empty (0 bytes)"),
    "too long": (entry("a.png", "word " * 50, "a cat"), "has 56 tokens, those of its image counted, and at most 40"),
}


class TestErrors:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        whole = write_picture(tmp_path / "a.png").read_bytes()
        (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "empty.png").write_bytes(b"")
        return tmp_path

    @pytest.mark.parametrize("error", ERRORS)
    def test_each_is_told(self, folder: Path, error: str) -> None:
        wrong, message = ERRORS[error]
        write_chats(folder, [LAYOUTS["LLaVA"], wrong])
        with pytest.raises(DataError) as caught:
            _read(folder)
        (line,) = caught.value.errors
        assert line.startswith("chats.json, entry 2: ")
        assert message in line

    def test_all_are_told_at_once_in_one_line_each(self, folder: Path) -> None:
        write_chats(folder, [wrong for wrong, _ in ERRORS.values()])
        (folder / "more.jsonl").write_text('{"image": \n', encoding="utf-8")
        with pytest.raises(DataError) as caught:
            _read(folder)
        assert len(caught.value.errors) == len(ERRORS) + 1
        assert not any("\n" in error for error in caught.value.errors)
        assert any(error.startswith("more.jsonl, line 1: is not JSON") for error in caught.value.errors)

    @pytest.mark.parametrize("text", ["[" * 100_000, '[{"image": ' + "1" * 5000 + "}]"])
    def test_json_that_python_gives_up_on(self, folder: Path, text: str) -> None:
        (folder / "chats.json").write_text(text, encoding="utf-8")
        with pytest.raises(DataError) as caught:
            _read(folder)
        (line,) = caught.value.errors
        assert line.startswith("chats.json: is not JSON that can be read (")

    def test_half_a_character_is_told(self, folder: Path) -> None:
        (folder / "chats.json").write_text(json.dumps([LAYOUTS["LLaVA"]]).replace("a cat", r"a cat \ud83d"))
        (folder / "more.jsonl").write_text(json.dumps(LAYOUTS["LLaVA"]).replace("a cat", r"a \ud83d\ude3a"))
        os.mkfifo(folder / "pipe.json")
        with pytest.raises(DataError) as caught:
            _read(folder)
        half, pipe = caught.value.errors
        assert half.startswith("chats.json: is not JSON that can be read (holds half a character")
        assert pipe == "pipe.json: is a pipe and no file; move it away."

    def test_a_file_of_another_encoding_is_one_error(self, folder: Path) -> None:
        (folder / "chats.json").write_bytes('[{"image": "gr\xfcn.png"}]'.encode("latin-1"))
        with pytest.raises(DataError, match="1 error in 1 files and images") as caught:
            _read(folder)
        (line,) = caught.value.errors
        assert line.startswith("chats.json: byte 0xfc at position 14 (line 1) is not UTF-8")

    def test_too_long_ones_are_skipped_if_asked(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_chats(folder, [LAYOUTS["LLaVA"], ERRORS["too long"][0]])
        with caplog.at_level("WARNING"):
            assert len(_read(folder, too_long="skip")) == 1
        assert "Left out conversations of more than 40 tokens: 1" in caplog.text
        with pytest.raises(DataError, match="no conversation is left"):
            _read(folder, too_long="skip", max_tokens=3)

    def test_bad_images_are_skipped_if_asked(self, folder: Path) -> None:
        write_chats(folder, [LAYOUTS["LLaVA"], ERRORS["corrupt image"][0]])
        assert len(_read(folder, skip_bad=True)) == 1

    def test_what_the_template_refuses(self, folder: Path) -> None:
        write_chats(folder, [LAYOUTS["LLaVA"]])
        info = ChatInfo(count_tokens=lambda samples: ["the chat template cannot render it."])
        with pytest.raises(DataError, match=r"entry 1: the chat template cannot render it\."):
            CHATS.read(ChatDataConfig(path=str(folder)), info)


class TestSamples:
    def test_zooms_are_views_of_one_size(self, tmp_path: Path) -> None:
        write_picture(tmp_path / "a.png", size=(40, 20))
        write_chats(tmp_path, [LAYOUTS["LLaVA"]])
        config = ChatDataConfig(path=str(tmp_path), zooms=(1.0, 2.0, 0.5))
        (sample,) = CHATS.read(config, INFO)
        whole, near, far = (np.asarray(view) for (view,) in CHATS.open(sample, config).views)
        assert whole.shape == near.shape == far.shape == (20, 40, 3)
        assert (far[0] == 255).all() and (far[:, 0] == 255).all()
        middle = whole[5:15, 10:30]
        assert np.abs(near[::2, ::2].astype(int) - middle).mean() < 40
        assert CHATS.identity(sample, config) != CHATS.identity(sample, ChatDataConfig())

    @pytest.mark.parametrize("size", [(1, 9), (9, 1), (1, 1)])
    def test_narrowest_images_can_be_zoomed(self, tmp_path: Path, size: tuple[int, int]) -> None:
        write_picture(tmp_path / "a.png", size=size)
        write_chats(tmp_path, [LAYOUTS["LLaVA"]])
        (sample,) = _read(tmp_path)
        assert [view.size for (view,) in CHATS.open(sample, ChatDataConfig(zooms=(0.5, 2.0))).views] == [size, size]

    def test_report_previews_and_questions(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            write_picture(tmp_path / name)
        write_chats(tmp_path, [entry("a.png", "What?", "red", "Why?", "so"), entry("b.png", "Which?", "red")])
        samples = _read(tmp_path)
        report = CHATS.describe(samples)
        assert (report.num_conversations, report.num_pictures, report.num_answers) == (2, 2, 3)
        assert report.commonest_answers[0] == ("red", 2)
        assert report.longest == ("chats.json, entry 1", _IMAGE_TOKENS + 4)
        requests = CHATS.previews(samples, PreviewConfig())
        assert [(request.prompt, request.sample.path.name) for request in requests] == [  # type: ignore[union-attr]
            ("What?", "a.png"),
            ("Which?", "b.png"),
        ]
        assert len(CHATS.previews(samples, PreviewConfig(prompts=("x", "y"), seeds=(0, 1)))) == 8
        assert {request.prompt for request in CHATS.previews(samples, PreviewConfig(prompts=("<image>\nWhy?",)))} == {
            "Why?"
        }
        assert [(request.prompt, answer) for request, answer in questions(samples)] == [
            ("What?", "red"),
            ("Which?", "red"),
        ]
        assert CHATS.largest(samples) == (_IMAGE_TOKENS + 4, 1)


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


ALONE: dict[str, Any] = {
    "id": "1",
    "model": "",
    "conversations": [{"from": "human", "value": "Write a haiku"}, {"from": "gpt", "value": "old pond"}],
}
PAIR: dict[str, Any] = {
    "images": ["a.png", "b.png"],
    "messages": [_message("user", "<image>\n<image>\nWhich is red?"), _message("assistant", "both")],
}
LATER = {
    "messages": [
        _message("user", "Hello"),
        _message("assistant", "Yes?"),
        _message("user", [{"type": "text", "text": "And"}, {"type": "image", "path": "b.png"}]),
        _message("assistant", "a cat"),
    ]
}


class TestImages:
    """Conversations about none or about several."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_picture(tmp_path / "a.png", size=(30, 20))
        write_picture(tmp_path / "b.png", 1, size=(20, 40))
        return tmp_path

    def test_each_turn_tells_its_images(self, folder: Path) -> None:
        write_chats(folder, [LAYOUTS["LLaVA"], ALONE, PAIR, LATER])
        samples = _read(folder)
        assert [[turn.num_images for turn in sample.turns] for sample in samples] == [
            [1, 0],
            [0, 0],
            [2, 0],
            [0, 0, 1, 0],
        ]
        assert [[image.size for image in sample.images] for sample in samples] == [
            [(30, 20)],
            [],
            [(30, 20), (20, 40)],
            [(20, 40)],
        ]
        config = ChatDataConfig(zooms=(1.0, 0.9))
        views = [CHATS.open(sample, config).views for sample in samples]
        assert [[len(view) for view in sample_views] for sample_views in views] == [[1, 1], [0, 0], [2, 2], [1, 1]]
        names = [json.dumps(CHATS.identity(sample, config)) for sample in samples]
        assert len(set(names)) == 4
        report = CHATS.describe(samples)
        assert (report.num_pictures, report.num_without_picture) == (2, 1)
        assert "about 2 images (1 without an image)" in report.lines()[0]
        assert CHATS.largest(samples)[1] == 2
        requests = CHATS.previews(samples, PreviewConfig())
        assert [request.sample.key for request in requests] == ["chats.json, entry 1", "chats.json, entry 4"]  # type: ignore[union-attr]
        assert [request.prompt for request, _ in questions(samples)] == [
            "What is it?",
            "Write a haiku",
            "Which is red?",
            "Hello",
        ]

    def test_one_image_in_the_first_question_keeps_its_name_in_caches(self, folder: Path) -> None:
        write_chats(folder, [LAYOUTS["LLaVA"]])
        digest, zooms, said = CHATS.identity(_read(folder)[0], ChatDataConfig())
        assert (len(digest), zooms, said) == (64, (1.0,), [["user", "What is it?"], ["assistant", "a cat"]])

    def test_texts_alone_are_previewed(self, folder: Path) -> None:
        write_chats(folder, [ALONE])
        (request,) = CHATS.previews(_read(folder), PreviewConfig())
        assert (request.prompt, request.sample.views) == ("Write a haiku", ((),))  # type: ignore[union-attr]

    def test_what_a_list_of_images_and_marks_must_be(self, folder: Path) -> None:
        wrong = {**PAIR, "images": ["a.png", "gone.png"]}
        three = {**PAIR, "images": ["a.png", "b.png", "a.png"]}
        write_chats(folder, [wrong, three, {**PAIR, "images": [1, 2]}])
        with pytest.raises(DataError) as caught:
            _read(folder)
        assert "names 3 images" in caught.value.errors[0]
        assert f"there is no image gone.png in {folder}" in caught.value.errors[1]
        assert "calls an image 1; give its file name" in caught.value.errors[2]


class TestLeftOut:
    def test_every_error_can_be(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        whole = write_picture(tmp_path / "a.png").read_bytes()
        (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "empty.png").write_bytes(b"")
        write_chats(tmp_path, [LAYOUTS["LLaVA"], *(wrong for wrong, _ in ERRORS.values())])
        (sample,) = _read(tmp_path, skip_bad=True)
        assert sample.key == "chats.json, entry 1"
        assert f"Left out, since data.skip_bad=true: {len(ERRORS)} (chats.json, entry 2, " in caplog.text
        assert "; kept: 1. For example, chats.json, entry 2: has no <image> in any turn" in caplog.text
        write_chats(tmp_path, [wrong for wrong, _ in ERRORS.values()])
        with pytest.raises(DataError, match=f"{len(ERRORS)} errors in 1 files"):
            _read(tmp_path, skip_bad=True)

    def test_held_out_files_are_left_out_and_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_picture(tmp_path / "a.png")
        for name in ("train.json", "val.json", "more.json"):
            write_chats(tmp_path, [LAYOUTS["LLaVA"]], name)
        write_picture(tmp_path / "test" / "a.png")
        write_chats(tmp_path / "test", [LAYOUTS["LLaVA"]])
        assert [sample.key for sample in _read(tmp_path)] == ["more.json, entry 1", "train.json, entry 1"]
        assert "left out what belongs to other splits: test (2 files), val (1 files)" in caplog.text
        assert [sample.key for sample in _read(tmp_path, split="val")] == ["val.json, entry 1"]
        assert len(_read(tmp_path, split="all")) == 4
        assert len(_read(tmp_path / "val.json")) == 1
        with pytest.raises(DataError, match=r"data\.split=test: data\.path=.*val\.json has no splits; drop it"):
            _read(tmp_path / "val.json", split="test")

    def test_messages_name_what_was_given(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        write_chats(tmp_path, [entry("gone.png", "What?", "a cat")])
        with pytest.raises(DataError, match=r"^data\.path=chats\.json: 1 error in 1 files") as caught:
            _read(Path("chats.json"))
        assert f"there is no image gone.png in {tmp_path}" in caught.value.errors[0]


@pytest.mark.parametrize("form", ["splits", "parquet"])
def test_rows_with_and_without_images(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    image = str(write_picture(tmp_path / "images" / "a.png", size=(30, 20)))
    said = [LAYOUTS["messages"]["messages"], ALONE["conversations"], PAIR["messages"]]
    said[1] = [_message(turn["from"], turn["value"]) for turn in ALONE["conversations"]]
    table = datasets.Dataset.from_dict({"images": [[image], [], [image] * 2], "messages": said})
    table = table.cast_column("images", datasets.List(datasets.Image()))
    if form == "splits":
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "saved"))
    else:
        for split in ("train", "test"):
            table.to_parquet(str(tmp_path / "saved" / f"{split}.parquet"))
        (tmp_path / "saved" / "more.json").write_text("[]")
    samples = _read(tmp_path / "saved")
    line = "the Parquet files are read, and other files are not: 1 (more.json)"
    assert (line in caplog.text) == (form == "parquet")
    assert [[image.size for image in sample.images] for sample in samples] == [[(30, 20)], [], [(30, 20)] * 2]
    assert samples[0].turns == TURNS
