"""Whole commands on images and questions: train, resume, ask, score, caption, check, and the tools for files."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from lora_diffusion.core.text import printable
from lora_diffusion.families.language import vision
from lora_diffusion.families.language.visual_question_answering import VisualQuestionAnswering
from tests.tiny_llava import entry, save_tiny_llava, save_tiny_llava_next, write_chats, write_picture
from tests.workflows.conftest import Commands, Outcome

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    names = [write_picture(folder / f"{index}.png", index).name for index in range(3)]
    texts = (("What?", "a cat"), ("What?", "a dog", "Sure?", "yes"), ("Colour?", "red"))
    write_chats(folder, [entry(name, *each) for name, each in zip(names, texts, strict=True)])
    return folder


@pytest.fixture
def train(command: Commands, base: Path, data: Path, tmp_path: Path) -> Train:
    settings = [
        "model.family=llava",
        f"model.path={base}",
        "model.max_new_tokens=8",
        f"data.path={data}",
        "data.zooms=[1.0, 0.9]",
        "adapter.rank=2",
        "adapter.dropout=0.1",
        "adapter.parts=[language_model, projector]",
        "adapter.full=[projector]",
        "train.learning_rate=1e-2",
        "train.part_learning_rates=[projector=1e-3]",
        "train.schedule=constant",
        "train.batch_size=2",
        "train.gradient_checkpointing=true",
        "train.threads=1",
        "output.dtype=fp32",
        "output.name=adapter",
    ]
    return lambda name, *more: command("train", *settings, f"output.path={tmp_path / name}", *more)


def test_resume_is_bit_for_bit(train: Train, tmp_path: Path) -> None:
    assert train("whole", "train.max_steps=5").code == 0
    assert train("halves", "train.max_steps=3").code == 0
    assert train("halves", "train.max_steps=5", "--resume").code == 0
    whole, halves = (
        load_file(tmp_path / name / "adapter.peft" / "adapter_model.safetensors") for name in ("whole", "halves")
    )
    assert any("multi_modal_projector" in name for name in whole)
    assert whole.keys() == halves.keys()
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "halves")
    ]
    assert losses[0] == losses[1]


def test_files_of_a_run_and_tools(train: Train, command: Commands, base: Path, data: Path, tmp_path: Path) -> None:
    outcome = train("run", "train.max_steps=2", "train.preview_every_steps=1", "adapter.parts=[language_model]",
                    "adapter.full=[]", "train.part_learning_rates=[]")  # fmt: skip
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    lines = (run / "previews" / "step-000001.tsv").read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1] for line in lines] == ["What?", "What?", "Colour?"]

    def said(*arguments: object) -> str:
        file = data / "1.png"
        texts = json.loads(command.good("ask", *arguments, "--question", "What?", file, "--json").out)
        assert list(texts) == [str(file)]
        return str(texts[str(file)])

    adapter = run / "adapter.peft"
    result = json.loads(command.good("inspect", adapter, "--json").out)
    assert result["metadata"]["modelspec.architecture"] == "llava/lora"
    with_adapter = said("--model", base, "--adapter", f"{adapter}:1")
    command.good("compose", f"{adapter}:0.5", f"{adapter}:0.5", "--output", tmp_path / "sum.peft")
    assert said("--model", base, "--adapter", f"{tmp_path / 'sum.peft'}:1") == with_adapter
    command.good("merge", "--model", base, "--adapter", f"{adapter}:1", "--output", tmp_path / "merged")
    assert said("--model", tmp_path / "merged") == with_adapter
    before, after = (
        LlavaForConditionalGeneration.from_pretrained(path).state_dict() for path in (base, tmp_path / "merged")
    )
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all("language_model.layers" in name for name in changed)
    command.good("resize", adapter, tmp_path / "small.peft", "--rank", "1")
    command.good("convert", adapter, tmp_path / "same.peft", "--to", "peft")
    assert said("--model", base, "--adapter", f"{tmp_path / 'same.peft'}:1") == with_adapter
    assert "use peft" in command("convert", adapter, tmp_path / "other.safetensors", "--to", "kohya").err


def test_mark_of_the_image_may_stand_in_the_question(command: Commands, base: Path, data: Path) -> None:
    texts = [
        command.good("ask", "--model", base, "--question", question, data / "1.png").out
        for question in ("What?", "<image>\nWhat?")
    ]
    assert texts[0] == texts[1]


def test_template_that_cannot_be_rendered_is_told_before_the_base_is_loaded(
    command: Commands, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VisualQuestionAnswering, "load", lambda *_: pytest.fail("the base was loaded"))
    template, config = tmp_path / "chat.jinja", tmp_path / "own.yaml"
    template.write_text("{% if %}")
    config.write_text(f"model:\n  family: llava\n  path: {base}\n  chat_template: {template}\n")
    outcome = command("ask", "--config", config, "--question", "What?", data / "1.png")
    assert outcome.code == 2
    assert "cannot be asked 'What?': the chat template of the base cannot render it" in outcome.message


def test_score(command: Commands, base: Path, data: Path) -> None:
    result = json.loads(command.good("ask", "--model", base, "--score", data, "--json").out)[str(data)]
    assert [one["target"] for one in sorted(result["answers"], key=lambda one: one["key"])] == ["a cat", "a dog", "red"]
    assert set(result["by_question"]) == {"What?", "Colour?"}
    assert 0 <= result["exact_match"] <= result["token_f1"] <= 1
    assert result["clip_score"] is None
    scored = command.good("ask", "--model", base, "--score", data, "--clip", "builtin:emoji-clip", "--json").out
    assert 0 <= json.loads(scored)[str(data)]["clip_score"] <= 2.5
    assert "exact match" in command.good("ask", "--model", base, "--score", data / "chats.json").out


@pytest.fixture(scope="module")
def next_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava_next(tmp_path_factory.mktemp("llava") / "next")


class TestNext:
    """LLaVA-NeXT counts the tokens of an image from its size."""

    def test_asks_and_captions_images_of_any_shape(self, command: Commands, next_base: Path, tmp_path: Path) -> None:
        sizes = [(40, 20), (20, 41), (1, 60), (16, 16)]
        for index, size in enumerate(sizes):
            write_picture(tmp_path / "pictures" / f"{index}.png", index, size)
        model = ("--model", next_base)
        result = command.good("ask", *model, "--question", "What?", tmp_path / "pictures", "--json").out
        assert len(json.loads(result)) == len(sizes)
        result = command.good("data", "caption", tmp_path / "pictures", *model, "--json").out
        assert len(json.loads(result)["written"]) + len(json.loads(result)["silent"]) == len(sizes)

    def test_trains_with_previews(self, command: Commands, next_base: Path, tmp_path: Path) -> None:
        names = [write_picture(tmp_path / "data" / f"{size}.png", size, (size, 24)).name for size in (8, 60)]
        write_chats(tmp_path / "data", [entry(name, "What?", "a cat") for name in names])
        run = tmp_path / "run"
        command.good(
            "train", "model.family=llava", f"model.path={next_base}", "model.max_new_tokens=3",
            f"data.path={tmp_path / 'data'}",
            "adapter.rank=2", "train.max_steps=1", "train.preview_every_steps=1", "train.threads=1",
            f"output.path={run}",
        )  # fmt: skip
        assert len((run / "previews" / "step-000001.tsv").read_text(encoding="utf-8").splitlines()) == 2


class TestScoreOptions:
    """Held-out files, as their owners have them."""

    def test_images_in_another_folder(
        self, command: Commands, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write_picture(tmp_path / "coco" / "a.png")
        write_chats(tmp_path, [entry("a.png", "What?", "a cat")], "c.json")
        Path("c.yaml").write_text(f"model:\n  family: llava\n  path: {base}\ndata:\n  images: coco\n")
        outcome = command("ask", "--model", base, "--score", "c.json")
        assert outcome.code == 2
        assert "data.path=c.json: 1 error" in outcome.message and f"image a.png in {tmp_path}" in outcome.message
        command.good("ask", "--model", base, "--score", "c.json", "--images", "coco", "--csv", "scores.csv")
        command.good("ask", "--config", "c.yaml", "--score", "c.json")
        (row,) = csv.DictReader(Path("scores.csv").read_text(encoding="utf-8").splitlines())
        assert (row["set"], row["question"], row["target"]) == ("c.json", "What?", "a cat")
        assert float(row["token_f1"]) >= 0
        message = command(
            "ask", "--model", base, "--score", "c.json", "--images", "coco", "--csv", "scores.csv"
        ).message
        assert "--csv scores.csv is there already" in message
        assert "--images is about answers" in command("ask", "--question", "x", "--images", "coco", "coco").message
        result = command.good("ask", "--model", base, "--question", "Why?", "coco", "--csv", "plain.csv").out
        (plain,) = csv.DictReader(Path("plain.csv").read_text(encoding="utf-8").splitlines())
        assert result == printable(f"{plain['picture']}\t{plain['answer']}\n") and plain["question"] == "Why?"

    def test_texts_alone_and_splits(self, command: Commands, base: Path, tmp_path: Path) -> None:
        alone = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}
        write_chats(tmp_path, [alone], "test.json")
        write_chats(tmp_path, [alone, alone], "train.json")
        for split, count in (((), 3), (("--split", "test"), 1)):
            result = command.good("ask", "--model", base, "--score", tmp_path, "--json", *split).out
            assert len(json.loads(result)[str(tmp_path)]["answers"]) == count
        outcome = command("ask", "--model", base, "--score", tmp_path, "--clip", "builtin:emoji-clip")
        assert "3 first questions show no image" in outcome.message


def test_mixed_conversations_train_and_resume(train: Train, base: Path, data: Path, tmp_path: Path) -> None:
    entries = json.loads((data / "chats.json").read_text(encoding="utf-8"))
    alone = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}
    pair = entry("0.png", "<image>Same?", "no") | {"images": ["0.png", "1.png"]}
    del pair["image"]
    for name in ("0.png", "1.png", "2.png"):
        shutil.copy(data / name, tmp_path / name)
    write_chats(tmp_path, [*entries, alone, pair, entry("gone.png", "What?", "x")], "mixed.json")
    more = (f"data.path={tmp_path / 'mixed.json'}", "data.skip_bad=true")
    outcome = train("whole", "train.max_steps=4", *more)
    assert outcome.code == 0, outcome.err
    assert "Left out, since data.skip_bad=true: 1 (mixed.json, entry 6)" in " ".join(outcome.err.split())
    assert train("halves", "train.max_steps=2", *more).code == 0
    assert train("halves", "train.max_steps=4", *more, "--resume").code == 0
    files = [load_file(tmp_path / name / "adapter.peft" / "adapter_model.safetensors") for name in ("whole", "halves")]
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


class TestCaption:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for index, name in enumerate(("a", "b", "in/c-d")):
            write_picture(tmp_path / "pictures" / f"{name}.png", index)
        return tmp_path / "pictures"

    @pytest.fixture(autouse=True)
    def _echo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # A random base may say nothing; what is asked is enough to see what is written where.
        real = VisualQuestionAnswering.generate

        def generate(self: VisualQuestionAnswering, loaded, requests):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return [replace(output, text=output.request.prompt) for output in real(self, loaded, requests)]

        monkeypatch.setattr(VisualQuestionAnswering, "generate", generate)

    def test_writes_what_is_missing_and_never_over_a_caption(self, command: Commands, base: Path, folder: Path) -> None:
        (folder / "a.txt").write_text("mine\n", encoding="utf-8")
        (folder / "b.caption").write_text("mine too\n", encoding="utf-8")
        arguments = (
            "data",
            "caption",
            folder,
            "--model",
            base,
            "--prompt",
            "Say {name} of {folder}.",
            "--trigger",
            "sks",
        )
        result = json.loads(command.good(*arguments, "--json").out)
        assert result["written"] == {str(folder / "in" / "c-d.txt"): "sks, Say c d of in."}
        assert (folder / "in" / "c-d.txt").read_text(encoding="utf-8") == "sks, Say c d of in.\n"
        assert result["kept"] == [str(folder / "a.png"), str(folder / "b.png")]
        assert (folder / "a.txt").read_text(encoding="utf-8") == "mine\n"
        assert not (folder / "b.txt").exists()
        assert "Wrote 0 captions; 3 images had one" in command.good(*arguments).out

    def test_mark_of_the_image_may_stand_in_the_prompt(self, command: Commands, base: Path, folder: Path) -> None:
        command.good("data", "caption", folder, "--model", base, "--prompt", "<image>\nSay {name}.")
        assert (folder / "a.txt").read_text(encoding="utf-8") == "Say a.\n"

    @pytest.mark.parametrize("ending", [".txt", ".caption"])
    def test_fills_a_file_that_is_empty(self, command: Commands, base: Path, folder: Path, ending: str) -> None:
        (folder / "a.txt").write_text("\ufeff \n", encoding="utf-8")
        arguments = ("data", "caption", folder, "--model", base, "--ending", ending, "--json")
        result = json.loads(command.good(*arguments).out)
        files = [folder / "a.txt", folder / f"b{ending}", folder / "in" / f"c-d{ending}"]
        assert result["written"] == dict.fromkeys(map(str, files), "Describe the picture.")
        assert (folder / "a.txt").read_text(encoding="utf-8") == "Describe the picture.\n"
        assert len(json.loads(command.good(*arguments).out)["kept"]) == 3

    @pytest.mark.parametrize("name", ["a.caption", "metadata.jsonl"])
    def test_empty_captions_in_two_places(self, command: Commands, base: Path, folder: Path, name: str) -> None:
        if name == "a.caption":
            (folder / "a.txt").touch()
        (folder / name).write_text("" if name == "a.caption" else '{"file_name": "a.png", "text": ""}')
        outcome = command("data", "caption", folder, "--model", base)
        assert outcome.code == 2
        assert "a.png: its caption is not in a.txt alone; remove the other one first." in outcome.message

    def test_overwrites_if_asked(self, command: Commands, base: Path, folder: Path) -> None:
        (folder / "a.txt").write_text("mine\n", encoding="utf-8")
        command.good("data", "caption", folder, "--model", base, "--overwrite")
        texts = {path.name: path.read_text(encoding="utf-8") for path in folder.rglob("*.txt")}
        assert texts == dict.fromkeys(("a.txt", "b.txt", "c-d.txt"), "Describe the picture.\n")

    def test_adds_no_trigger_that_is_there(self, command: Commands, base: Path, folder: Path) -> None:
        command.good("data", "caption", folder, "--model", base, "--prompt", "a sks cat", "--trigger", "sks")
        assert (folder / "a.txt").read_text(encoding="utf-8") == "a sks cat\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--prompt", "{title}"), "holds {title}; it may hold {name} and {folder}"),
            (("--prompt", "{name} {name:q}"), "holds {name:q}; it may hold {name} and {folder}"),
            (("--prompt", "{name:{folder}}"), "holds {name:{folder}}; it may hold {name} and {folder}"),
            (("--prompt", "{name!x}"), "holds {name!x}; it may hold {name} and {folder}"),
            (("--prompt", "{"), "a brace without its pair"),
            (("--ending", ".json"), "--ending .json: captions are read from files that end in .txt or .caption"),
            (("--model", "builtin:emoji"), "there is no such built-in base of this family"),
            (("--overwrite",), "b.png: its caption is not in b.txt alone; remove the other one first."),
        ],
    )
    def test_bad_input_writes_nothing(
        self, command: Commands, base: Path, folder: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        (folder / "b.caption").write_text("mine\n", encoding="utf-8")
        model = () if "--model" in arguments else ("--model", base)
        outcome = command("data", "caption", folder, *model, *arguments)
        assert outcome.code == 2
        assert message in outcome.message
        assert not list(folder.rglob("*.txt"))

    def test_unreadable_and_twin_images_are_reported_at_once(self, command: Commands, base: Path, folder: Path) -> None:
        (folder / "bad.png").write_bytes(b"no picture")
        write_picture(folder / "a.bmp")
        outcome = command("data", "caption", folder, "--model", base)
        assert outcome.code == 2
        assert "bad.png: is no png" in outcome.message
        assert "a.bmp and a.png would share a caption file" in outcome.message


class TestCheck:
    def test_conversations(self, command: Commands, base: Path, data: Path) -> None:
        arguments = ("model.family=llava", f"model.path={base}")
        result = json.loads(command.good("data", "check", data, *arguments, "--json").out)
        assert (result["num_conversations"], result["num_answers"]) == (3, 4)
        assert "No errors." in command.good("data", "check", data, *arguments).out

    def test_images(self, command: Commands, images: Path) -> None:
        assert "Pictures:" in command.good("data", "check", images).out

    def test_errors(self, command: Commands, tmp_path: Path) -> None:
        write_picture(tmp_path / "a.png")
        outcome = command("data", "check", tmp_path)
        assert outcome.code == 2
        assert "None of the 1 images has a caption" in outcome.message
        assert command("data", "check", tmp_path, "data.captions=optional").code == 0
        assert command("data", "check").code == 2


def test_dry_run(train: Train) -> None:
    outcome = train("dry", "--dry-run", "train.epochs=2", "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert (result["data"]["num_pictures"], result["steps"]) == (3, 4)
    assert {module["part"] for module in result["plan"]["modules"] if module["identity"]} == {"projector"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.flip=true"], "data.flip: there is no such key"),
        (["data.zooms=[3.0]"], "must be one or more different scales between 0.5 and 2"),
        (["adapter.full=[vision_tower]"], "adapter.full asks for vision_tower, which is not trained"),
        (["train.part_learning_rates=[unet=1]"], "'unet=1' does not name one of adapter.parts and a rate"),
        (["output.formats=[kohya]"], "LLaVA adapters have no format kohya; use peft"),
        (["data.max_tokens=9"], "and at most 9 are allowed"),
    ],
)
def test_bad_settings(train: Train, tmp_path: Path, overrides: list[str], message: str) -> None:
    outcome = train("bad", "train.max_steps=1", *overrides)
    assert outcome.code == 2, outcome.message
    assert message in outcome.message
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


def test_layers_of_the_text_encoder_that_are_never_read_are_left_out_and_named(train: Train, tmp_path: Path) -> None:
    parts = ("adapter.parts=[vision_tower]", "adapter.full=[]", "train.part_learning_rates=[]")
    outcome = train("run", "train.max_steps=1", *parts, "adapter.targets=[all-linear]")
    assert outcome.code == 0, outcome.err
    result = "left out: 6 modules whose output this base never reads (vision_tower/encoder.layers.1."
    assert result in " ".join(outcome.err.split())
    record = json.loads((tmp_path / "run" / "adapter.peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert record["base_model_name_or_path"] is None
    assert record["auto_mapping"]["base_model_class"] == "LlavaForConditionalGeneration"
    names = load_file(tmp_path / "run" / "adapter.peft" / "adapter_model.safetensors")
    assert names and not any(".layers.1." in name for name in names)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["unread"]) == 6
    outcome = train("bad", "train.max_steps=1", *parts, "adapter.targets=[encoder.layers.1.mlp.fc1]")
    assert outcome.code == 2
    assert "matches only vision_tower/encoder.layers.1.mlp.fc1, whose output this base never reads" in outcome.message


def test_a_run_that_was_begun_with_unread_layers_goes_on_so(train: Train, tmp_path: Path) -> None:
    settings = (
        "adapter.parts=[vision_tower]",
        "adapter.full=[]",
        "train.part_learning_rates=[]",
        "adapter.targets=[all-linear]",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vision, "_unread", lambda folder: ())
        assert train("run", "train.max_steps=1", *settings).code == 0
    path = tmp_path / "run" / "plan.json"
    plan = json.loads(path.read_text(encoding="utf-8"))
    del plan["unread"]
    path.write_text(json.dumps(plan), encoding="utf-8")
    outcome = train("run", "train.max_steps=2", *settings, "--resume")
    assert outcome.code == 0, outcome.err
