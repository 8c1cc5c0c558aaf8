"""Held-out samples of bases that write text: scored while they train, and never trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_diffusion.workflows.hooks.held_out_scores import HeldOutScores
from tests.tiny_llava import entry, save_tiny_llava, write_chats, write_picture
from tests.tiny_whisper import save_tiny_whisper, write_recording
from tests.workflows.conftest import Commands, Outcome

Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_whisper(tmp_path_factory.mktemp("whisper") / "base")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recordings")
    for index, text in enumerate(("one", "two three", "four", "five")):
        write_recording(folder / f"{index}.wav", text, seconds=0.3, pitch=200.0 + 100 * index)
    return folder


@pytest.fixture
def train(command: Commands, base: Path, recordings: Path, tmp_path: Path) -> Train:
    settings = ["model.family=whisper", f"model.path={base}", f"data.path={recordings}", "model.mask_time_prob=0.2"]
    settings += ["data.speeds=[1.0, 1.1]", "adapter.rank=2", "adapter.dropout=0.1", "train.learning_rate=1e-2"]
    settings += ["train.batch_size=2", "train.threads=1", "output.dtype=fp32", "output.name=adapter"]
    settings += ["model.repetition_guard=false", "train.schedule=constant"]
    return lambda name, *more: command("train", *settings, f"output.path={tmp_path / name}", *more)


def progress(run: Path) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = json.loads((run / "progress.json").read_text())
    return lines


def test_scores_best_checkpoint_and_report(train: Train, command: Commands, tmp_path: Path) -> None:
    options = ("data.validation=0.25", "evaluate.every_steps=2", "evaluate.metrics=[loss, wer]", "train.max_steps=5")
    done = train("run", *options, "train.keep_checkpoints=1")
    assert done.code == 0, done.message
    lines = progress(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert all(line["score"] == -line["loss"] and line["wer"] >= 0 for line in lines)
    assert len({line["loss"] for line in lines}) == 3
    best = int(max(lines, key=lambda line: line["score"])["step"])
    assert (tmp_path / "run/checkpoints" / f"step-{best:06d}").is_dir()
    result = command.good("report", tmp_path / "run").out
    assert "report.html" in result
    assert f"the best step is {best}" in (tmp_path / "run/report.html").read_text()


def test_the_best_step_is_written_where_it_is_not_the_last(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(HeldOutScores, "measure", lambda _: {"loss": next(losses)})
    options = ("data.validation=0.25", "evaluate.every_steps=1", "evaluate.metrics=[loss]", "train.max_steps=4")
    assert train("run", *options).code == 0
    best = 2
    written = load_file(tmp_path / "run/adapter-best.peft/adapter_model.safetensors")
    kept = load_file(tmp_path / "run/checkpoints" / f"step-{best:06d}" / "adapter.safetensors")
    assert {tuple(tensor.shape) for tensor in written.values()} == {tuple(tensor.shape) for tensor in kept.values()}
    total = sum(tensor.double().square().sum() for tensor in written.values())
    torch.testing.assert_close(total, sum(tensor.double().square().sum() for tensor in kept.values()))
    assert "adapter-best.peft" in json.dumps(json.loads((tmp_path / "run/files.json").read_text()))


def test_stopped_and_continued_equals_one_run(train: Train, tmp_path: Path) -> None:
    options = ("data.validation=0.25", "evaluate.every_steps=2", "evaluate.metrics=[loss]")
    assert train("whole", *options, "train.max_steps=6").code == 0
    assert train("halves", *options, "train.max_steps=4").code == 0
    assert train("halves", *options, "train.max_steps=6", "--resume").code == 0
    assert progress(tmp_path / "whole") == progress(tmp_path / "halves")
    whole, halves = (
        load_file(tmp_path / name / "adapter.peft/adapter_model.safetensors") for name in ("whole", "halves")
    )
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_validation_changes_no_step_of_what_is_trained(train: Train, recordings: Path, tmp_path: Path) -> None:
    held_out = ("data.validation=0.25", "train.max_steps=3")
    assert train("scored", *held_out, "evaluate.every_steps=1", "evaluate.metrics=[loss, wer]").code == 0
    assert train("once", *held_out, "evaluate.every_steps=3", "evaluate.metrics=[loss]").code == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("scored", "once")
    ]
    assert losses[0] == losses[1]


def test_patience_ends_the_run(train: Train, tmp_path: Path) -> None:
    options = ("data.validation=0.25", "evaluate.every_steps=1", "evaluate.patience=1", "evaluate.metrics=[loss]")
    assert train("run", *options, "train.max_steps=40", "train.learning_rate=3").code == 0
    assert len(progress(tmp_path / "run")) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evaluate.every_steps=2"], "needs data.validation"),
        (["evaluate.patience=2"], "needs data.validation"),
        (["data.validation=0.9"], "at most 0.5"),
        (["data.validation=nowhere"], "nowhere"),
        (["data.validation=0.25", "evaluate.metrics=[clip_text]"], "is no score of data.validation"),
        (["data.validation=0.25", "evaluate.metrics=[wr]"], 'did you mean "wer"'),
        (["data.validation=0.25", "evaluate.references=x"], "is about images"),
    ],
)
def test_what_cannot_be_validated_is_told_before_training(
    train: Train, tmp_path: Path, options: list[str], message: str
) -> None:
    outcome = train("run", *options)
    assert outcome.code == 2
    assert message in outcome.message
    assert not (tmp_path / "run").exists()


def test_data_that_is_trained_on_is_refused(train: Train, recordings: Path) -> None:
    outcome = train("run", f"data.validation={recordings}")
    assert outcome.code == 2
    assert "are trained on as well" in outcome.message


def test_conversations_of_another_file(command: Commands, tmp_path: Path) -> None:
    base = save_tiny_llava(tmp_path / "base")
    for folder, answers in (("train", ("a cat", "a dog")), ("other", ("a fox",))):
        (tmp_path / folder).mkdir()
        names = [write_picture(tmp_path / folder / f"{i}{folder}.png", i).name for i in range(len(answers))]
        write_chats(tmp_path / folder, [entry(name, "What?", text) for name, text in zip(names, answers, strict=True)])
    options = [f"model.path={base}", f"data.path={tmp_path / 'train'}", f"data.validation={tmp_path / 'other'}"]
    options += ["model.family=llava", "model.max_new_tokens=4", "adapter.rank=2", "train.threads=1"]
    options += ["train.max_steps=2", f"output.path={tmp_path / 'run'}"]
    command.good("train", *options)
    lines = progress(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all({"exact_match", "token_f1", "loss"} < line.keys() for line in lines)
