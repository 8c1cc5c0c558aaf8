"""What a training run leaves, what changes its result, and what must not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_diffusion.config.load import load
from lora_diffusion.families.sd1 import FAMILY
from lora_diffusion.training.run_folder import RunFolder
from tests.workflows.conftest import Commands, fill_with_images


class Training:
    """Short runs on the tiny base."""

    def __init__(self, command: Commands, base: Path, images: Path, folder: Path) -> None:
        self.command, self.folder = command, folder
        self.settings = [
            f"model.path={base}",
            f"data.path={images}",
            "data.caption_lines=each",
            "adapter.rank=2",
            "train.max_steps=4",
            "train.learning_rate=1e-2",
            "train.precision=fp32",
            "train.threads=1",
            "output.dtype=fp32",
        ]

    def __call__(self, name: str, *arguments: str) -> Path:
        run = self.folder / name
        self.command.good("train", *self.settings, f"output.path={run}", "output.name=adapter", *arguments)
        return run


@pytest.fixture
def train(command: Commands, tiny_base: Path, images: Path, tmp_path: Path) -> Training:
    return Training(command, tiny_base, images, tmp_path)


def _assert_equal(one: Path, other: Path) -> None:
    first, second = load_file(one / "adapter.safetensors"), load_file(other / "adapter.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_run_folder(command: Commands, trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.yaml", "plan.json", "metrics.jsonl", "checkpoints"}
    assert names >= {"run.safetensors", "run.diffusers.safetensors", "run.peft"}
    assert not [name for name in names if name.startswith(".part-")]
    load(trained / "config.yaml")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    plan = json.loads((trained / "plan.json").read_text())
    with safe_open(trained / "run.safetensors", "pt") as file:
        assert len(list(file.keys())) == 3 * len(plan["modules"])
        metadata = file.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    report = json.loads(command.good("inspect", trained / "run.safetensors", "--json").out)
    assert report["problems"] == []
    assert report["format"] == "kohya"


def test_result_as_json_alone_on_stdout(train: Training) -> None:
    run = train.folder / "json"
    outcome = train.command.good("train", *train.settings, f"output.path={run}", "--json")
    result = json.loads(outcome.out)
    assert result["steps"] == 4
    assert result["files"] == [str(run / "json.safetensors")]


def test_previews_change_nothing(train: Training) -> None:
    plain = train("plain", "adapter.parts=[unet, text_encoder]", "adapter.dropout=0.2")
    shown = train(
        "shown",
        "adapter.parts=[unet, text_encoder]",
        "adapter.dropout=0.2",
        "train.preview_every_steps=1",
        "preview.num_steps=2",
        "preview.seeds=[3, 4]",
    )
    _assert_equal(plain, shown)
    assert len(list((shown / "previews").iterdir())) == 5


def test_previews_after_the_text_encoder_is_gone(train: Training) -> None:
    run = train("run", "train.preview_every_steps=2", "preview.num_steps=2", "preview.prompts=[a cat, a dog]")
    assert sorted(path.name for path in (run / "previews").iterdir()) == [
        "step-000000.png",
        "step-000002.png",
        "step-000004.png",
    ]


def test_gradient_checkpointing_and_cache_change_nothing(train: Training, tmp_path: Path) -> None:
    both = ["adapter.parts=[unet, text_encoder]", "model.prior_weight=0.3", "adapter.dropout=0.2"]
    plain = train("plain", *both)
    thrifty = train("thrifty", *both, "train.gradient_checkpointing=true", f"cache.path={tmp_path / 'cache'}")
    first, second = load_file(plain / "adapter.safetensors"), load_file(thrifty / "adapter.safetensors")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_other_seed_gives_another_adapter(train: Training) -> None:
    one, other = (
        load_file(train("a") / "adapter.safetensors"),
        load_file(train("b", "train.seed=1") / "adapter.safetensors"),
    )
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_longer_run_continues_a_finished_one(train: Training) -> None:
    run = train("run", "train.schedule=constant")
    train("run", "train.schedule=constant", "--resume", "train.max_steps=7")
    _assert_equal(run, train("whole", "train.schedule=constant", "train.max_steps=7"))
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 8))


def test_resume_of_a_finished_run_writes_the_files_again(train: Training) -> None:
    run = train("run")
    before = load_file(run / "adapter.safetensors")
    (run / "adapter.safetensors").unlink()
    train("run", "--resume", "output.formats=[kohya, peft]")
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(run / "adapter.safetensors").items())
    assert (run / "adapter.peft").is_dir()


def test_resume_where_nothing_is_starts(train: Training) -> None:
    assert (train("new", "--resume") / "adapter.safetensors").is_file()


def test_runs_from_before_caption_lines_go_on_with_a_caption_in_each_line(train: Training, images: Path) -> None:
    run = train("run", "train.max_steps=2")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("  caption_lines: each\n", ""))
    assert RunFolder(run).config().data.caption_lines == "each"
    settings = [*train.settings, f"output.path={run}", "output.name=adapter"]
    settings.remove("data.caption_lines=each")
    assert "Captions:     8" in train.command.good("train", *settings, "--dry-run").out
    train.command.good("train", *settings, "--resume")
    assert "caption_lines: each" in config.read_text()
    train.command.good("train", *settings, "--resume")
    refused = train.command("train", *settings, "data.caption_lines=first", "--resume")
    assert refused.code == 2 and "data.caption_lines" in refused.message


def test_resume_with_other_data_is_refused(train: Training, images: Path) -> None:
    run = train("run")
    (images / "0.txt").write_text("another cat, sks style")
    outcome = train.command("train", *train.settings, f"output.path={run}", "output.name=adapter", "--resume")
    assert outcome.code == 2
    assert "data:" in outcome.message


def test_overwrite_removes_the_run_and_nothing_else(train: Training) -> None:
    run = train("run", "output.formats=[kohya, peft]")
    (run / "notes.txt").write_text("mine")
    (run / "more").mkdir()
    train("run", "--overwrite", "train.max_steps=2", "adapter.rank=3")
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "more").is_dir()
    assert not (run / "adapter.peft").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_paths_with_spaces_and_other_letters(train: Training, tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "Bilder ü 猫 #1: [neu]"
    base = shutil.copytree(tiny_base, root / "die Basis")
    images = fill_with_images(root / "meine Bilder")
    train.settings[:2] = [f"model.path={base}", f"data.path={images}"]
    run = root / "ein Lauf = 1"
    train.command.good("train", *train.settings, f"output.path={run}")
    assert (run / "ein Lauf = 1.safetensors").is_file()
    train.command.good("train", *train.settings, f"output.path={run}", "--resume")
    train.command.good("inspect", run / "ein Lauf = 1.safetensors")
    adapter = f"{run / 'ein Lauf = 1.safetensors'}:0.5"
    arguments = ("--adapter", adapter, "--prompt", "猫 ü", "--steps", "1", "--output", root / "neu")
    train.command.good("generate", "--model", base, *arguments)
    assert (root / "neu" / "grid.png").is_file()


def test_home_folder_is_meant_by_a_tilde(train: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train.command.good("train", *train.settings, "output.path=~/run")
    assert (tmp_path / "run" / "run.safetensors").is_file()
    assert not (tmp_path / "~").exists()


def test_dry_run_loads_no_weights_and_writes_nothing(
    train: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("a dry run loaded the base")

    monkeypatch.setattr(type(FAMILY), "load", refuse)
    monkeypatch.setenv("LORA_DIFFUSION_CACHE", str(tmp_path / "unused"))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", *train.settings, f"output.path={tmp_path / 'run'}", "train.epochs=3", "train.max_steps=null"]
    text = train.command.good(*arguments, "--dry-run").out
    assert "32 modules" in text
    assert "steps   12" in text
    estimate = json.loads(train.command.good(*arguments, "--dry-run", "--json").out)
    assert estimate["steps"] == 12
    assert estimate["data"]["num_pictures"] == 4
    assert estimate["plan"]["modules"]
    assert estimate["memory"]["total_bytes"] > 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft"])
def test_export(command: Commands, trained: Path, tmp_path: Path, format_name: str) -> None:
    target = tmp_path / "deep" / ("folder" if format_name == "peft" else "file.safetensors")
    result = json.loads(command.good("export", trained, "--to", format_name, "--output", target, "--json").out)
    assert result == {"file": str(target), "format": format_name}
    command.good("export", trained, "--to", format_name, "--output", target, "--overwrite")
    ending = {"kohya": "run.safetensors", "diffusers": "run.diffusers.safetensors", "peft": "run.peft"}[format_name]
    pairs = [(target, trained / ending)]
    if format_name == "peft":
        pairs = [(file, trained / ending / file.relative_to(target)) for file in target.rglob("*.safetensors")]
    for ours, theirs in pairs:
        one, other = load_file(ours), load_file(theirs)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-6, atol=0, msg=name)


def test_prior_weight_without_trigger_words_is_said(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    paths = [f"model.path={tiny_base}", f"data.path={images}", f"output.path={tmp_path / 'run'}", "data.trigger="]
    outcome = command.good("train", *paths, "adapter.rank=2", "train.max_steps=1", "model.prior_weight=0.5")
    assert "model.prior_weight=0.5 does nothing" in outcome.message
