"""Choosing the best checkpoint of a run, ending a run early, and showing it on a page."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

from lora_diffusion.cli.main import main
from lora_diffusion.config.load import load
from lora_diffusion.core.files import shipped_path
from lora_diffusion.evaluation import results
from lora_diffusion.formats.metadata import hashes
from lora_diffusion.training import run_files
from lora_diffusion.workflows.select import cases, scorers
from tests.workflows.conftest import Commands, fill_with_images

CLIP = "builtin:emoji-clip"


def settings(base: Path, images: Path, run: Path) -> list[str]:
    return [
        f"model.path={base}",
        f"data.path={images}",
        "data.caption_lines=each",
        f"output.path={run}",
        "adapter.rank=2",
        "train.max_steps=4",
        "train.save_every_steps=2",
        "train.keep_checkpoints=0",
        "train.learning_rate=3e-2",
        "train.precision=fp32",
        "train.threads=1",
        "preview.num_steps=1",
        f"evaluate.references={images}",
        f"evaluate.clip={CLIP}",
        "evaluate.weights=[0.5, 1.0]",
        "evaluate.seeds=[0]",
        "evaluate.picture_draws=2",
    ]


@pytest.fixture(scope="module")
def selected(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose at its end; shared, never changed."""
    root = tmp_path_factory.mktemp("selected")
    images = fill_with_images(root / "pictures")
    with redirect_stdout(io.StringIO()) as out:
        arguments = [*settings(tiny_base, images, root / "run"), "evaluate.after_training=true", "--json"]
        assert main(["train", *arguments]) == 0
    (root / "printed.json").write_text(out.getvalue())
    return root / "run"


def test_training_chooses_marks_and_links_at_its_end(selected: Path) -> None:
    values = json.loads((selected / "selection.json").read_text())
    evaluation = results.read(selected / "evaluation")
    assert {candidate.step for candidate in evaluation.candidates} == {None, 2, 4}
    assert {candidate.weight for candidate in evaluation.candidates} == {0.0, 0.5, 1.0}
    assert {(case.group) for case in evaluation.cases} == {"subject", "prior"}
    assert values["candidate"] in {candidate.name for candidate in evaluation.candidates[1:]}
    printed = json.loads((selected.parent / "printed.json").read_text())["selection"]
    assert {key: printed[key] for key in ("weight", "why")} == {key: values[key] for key in ("weight", "why")}
    best = selected / "best.safetensors"
    assert best.is_symlink()
    assert best.resolve() == (selected / values["file"]).resolve()
    with safe_open(best, "pt") as file:
        result = file.metadata()
    assert result["lora_diffusion.recommended_weight"] == f"{values['weight']:g}"
    assert result["modelspec.usage_hint"] == f"weight {values['weight']:g}"
    assert result["ss_steps"] == str(values["step"])
    assert json.loads(result["lora_diffusion.scores"]).keys() >= {"clip_text", "clip_image", "copying"}


@pytest.mark.parametrize("step", [2, 4])
def test_marked_file_holds_the_checkpoint_as_it_was(
    command: Commands, selected: Path, tmp_path: Path, step: int
) -> None:
    run = shutil.copytree(selected, tmp_path / "run", symlinks=True)
    before = {path: load_file(path) for path in run.glob("*.safetensors") if not path.is_symlink()}
    # An evaluation that knows one checkpoint only leaves no other choice.
    evaluation = results.read(run / "evaluation")
    kept = [c for c in evaluation.candidates if c.step in (None, step)]
    values = {**vars(evaluation), "candidates": kept}
    values["scores"] = [s for s in evaluation.scores if s.step in (None, step)]
    results.write(results.Evaluation(**values), tmp_path / "evaluation")
    arguments = ("select", run, "--evaluation", tmp_path / "evaluation", "--json")
    result = json.loads(command.good(*arguments).out)
    file = Path(result["file"])
    assert file.name == ("run-step-000002.safetensors" if step == 2 else "run.safetensors")
    assert [path.name for path in run.glob("run-step-*")] == (["run-step-000002.safetensors"] if step == 2 else [])
    raw = load_file(run / f"checkpoints/step-{step:06d}/adapter.safetensors")
    tensors = load_file(file)
    assert len(tensors) == 3 * len(raw) / 2
    downs = sorted(float(tensor.float().sum()) for name, tensor in tensors.items() if "lora_down" in name)
    assert downs == pytest.approx(sorted(float(v.half().float().sum()) for n, v in raw.items() if n.endswith("down")))
    with safe_open(file, "pt") as opened:
        reply = opened.metadata()
    assert {**reply, **hashes(load_arrays(file), reply)} == reply
    if step == 4:
        assert all(torch.equal(tensor, before[file][name]) for name, tensor in tensors.items())
    assert json.loads(command.good("inspect", file, "--json").out)["problems"] == []


def test_longer_run_is_looked_at_again(command: Commands, selected: Path, tiny_base: Path, tmp_path: Path) -> None:
    run, images = shutil.copytree(selected, tmp_path / "run", symlinks=True), selected.parent / "pictures"
    arguments = [*settings(tiny_base, images, run), "evaluate.after_training=true", "train.max_steps=6"]
    assert "the choice of its best checkpoint is dropped" in command.good("train", *arguments, "--resume").message
    evaluation = results.read(run / "evaluation")
    assert {candidate.step for candidate in evaluation.candidates} == {None, 2, 4, 6}

    shutil.copytree(selected / "evaluation", run / "old")
    outcome = json.loads(command.good("select", run, "--evaluation", run / "old", "--json").out)
    assert any("step-000006 of the run came after the evaluation" in warning for warning in outcome["warnings"])


def test_choice_goes_with_the_run_that_it_was_made_for(
    command: Commands, selected: Path, tiny_base: Path, tmp_path: Path
) -> None:
    run, images = shutil.copytree(selected, tmp_path / "run", symlinks=True), selected.parent / "pictures"
    old = run / "run-step-000002.safetensors"
    shutil.copy(run / "run.safetensors", old)
    run_files.add(run, [old.name])
    plain = settings(tiny_base, images, run)
    command.good("train", *plain, "--resume")
    assert old.exists()
    assert (run / "selection.json").exists(), "nothing was trained"
    command.good("train", *plain, "--resume", "train.max_steps=5")
    marks = [old, run / "selection.json", run / "best.safetensors"]
    assert not any(path.is_symlink() or path.exists() for path in marks)

    old.touch()
    run_files.add(run, [old.name])
    command.good("train", *plain, "--overwrite")
    assert not old.exists()


def test_report_shows_what_was_chosen_from_where(command: Commands, selected: Path, tmp_path: Path) -> None:
    run, page = shutil.copytree(selected, tmp_path / "run", symlinks=True), tmp_path / "page.html"
    assert json.loads((run / "selection.json").read_text())["evaluation"] == "evaluation"
    shown = "File: <code>"
    command.good("report", run, "--output", page)
    assert shown in page.read_text()

    evaluation = results.read(run / "evaluation")
    values = {**vars(evaluation), "candidates": [c for c in evaluation.candidates if c.step in (None, 2)]}
    values["scores"] = [score for score in evaluation.scores if score.step in (None, 2)]
    results.write(results.Evaluation(**values), tmp_path / "few")
    result = json.loads(command.good("select", run, "--evaluation", tmp_path / "few", "--json").out)
    assert result["evaluation"] == str(tmp_path / "few")
    command.good("report", run, "--output", page)
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert len(numbers["evaluation"]["candidates"]) == len(values["candidates"])
    assert shown in page.read_text()

    chosen = json.loads((run / "selection.json").read_text())
    (run / "selection.json").write_text(json.dumps({**chosen, "candidate": "step-000009@1.0"}))
    command.good("report", run, "--output", page)
    assert "Recommended:" in page.read_text()
    assert shown not in page.read_text()


def test_scorers_of_a_config_reach_the_evaluation(tmp_path: Path) -> None:
    extra = settings(tmp_path, tmp_path, tmp_path / "run")
    named = scorers(load(None, [*extra, "evaluate.scorers=[dino=a, preference=b/c, probe=d]"]))
    assert named == {"clip": CLIP, "dino": "a", "preference": "b/c", "probe": "d"}
    assert scorers(load(None, [*extra, "evaluate.clip=null"])) == {}


def test_equal_captions_are_one_prompt(images: Path, tiny_base: Path, tmp_path: Path) -> None:
    for path in images.glob("*.txt"):
        path.write_text("a sks dog")
    config = load(None, settings(tiny_base, images, tmp_path / "run"))
    assert [(case.group, case.prompt) for case in cases(config, "sks")] == [
        ("subject", "a sks dog"),
        ("prior", "a dog"),
    ]


def test_captions_that_differ_in_the_trigger_only_have_one_plain_prompt(
    images: Path, tiny_base: Path, tmp_path: Path
) -> None:
    for index, path in enumerate(sorted(images.glob("*.txt"))):
        path.write_text(("a sks dog", "a dog, sks", "sks a dog")[index % 3])
    config = load(None, settings(tiny_base, images, tmp_path / "run"))
    assert [case.prompt for case in cases(config, "sks") if case.group == "prior"] == ["a dog"]
    assert len([case for case in cases(config, "sks") if case.group == "subject"]) == 3


def test_choice_of_another_run_is_refused(command: Commands, selected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(selected, tmp_path / "run", symlinks=True)
    for path in (run / "checkpoints").iterdir():
        (path / "adapter.safetensors").write_bytes(b"other")
    outcome = command("select", run, "--evaluation", run / "evaluation")
    assert outcome.code == 2
    assert "no checkpoint of" in outcome.message


def test_report_of_a_run_with_damaged_records(command: Commands, selected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(selected, tmp_path / "run", symlinks=True)
    assert "damaged" not in command.good("report", run).err
    for name in ("metrics.jsonl", "picture_losses.json", "selection.json"):
        with (run / name).open("r+b") as stream:
            stream.write(b"\x00" * 20)
        # The console breaks long paths.
        assert name in "".join(command.good("report", run).err.split())


def test_damaged_checkpoint_is_no_candidate(command: Commands, selected: Path, tmp_path: Path) -> None:
    run = shutil.copytree(selected, tmp_path / "run", symlinks=True)
    (run / "checkpoints" / "step-000002" / "state.json").write_bytes(b"\x00" * 20)
    outcome = command.good("select", run)
    assert "1 damaged checkpoints are left out" in outcome.message
    assert "step-000004" in outcome.out
    (run / "checkpoints" / "step-000004" / "state.json").write_bytes(b"\x00" * 20)
    assert command("evaluate", "--run", run, "--prompts", "emoji", "--output", tmp_path / "e").code != 0


def test_select_says_what_is_missing(command: Commands, trained: Path, tmp_path: Path) -> None:
    outcome = command("select", trained)
    assert outcome.code == 2
    assert "evaluate.references" in outcome.message
    assert command("select", tmp_path / "nothing").code == 2
    assert "--text-weight 2" in command("select", trained, "--text-weight", "2").message
    assert "--max-copying nan: must be a finite" in command("select", trained, "--max-copying", "nan").message
    assert "train.seed=3: only evaluate.key=value" in command("select", trained, "train.seed=3").message
    arguments = ("--evaluation", tmp_path, "evaluate.seeds=[1]")
    assert "evaluate.seeds=[1] does nothing beside --evaluation" in command("select", trained, *arguments).message


def test_select_ends_with_one_line_of_warnings(command: Commands, selected: Path) -> None:
    result = command("select", selected, "--evaluation", selected / "evaluation")
    values = json.loads((selected / "selection.json").read_text())
    assert len(values["warnings"]) > 1
    lines = result.out.strip().splitlines()
    assert len(lines) == 3
    assert f"(+{len(values['warnings']) - 1} more in 'lora-diffusion report" in lines[-1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.references=nowhere", "nowhere"),
        ("evaluate.prompts=nothing", "evaluate.prompts=nothing: there is no such file or suite"),
        ("evaluate.references=null", "needs evaluate.references"),
        ("output.name=best", "another output.name"),
        ("evaluate.weights=[0]", "evaluate.weights"),
        ("evaluate.metrics=[clip_imag]", 'did you mean "clip_image"'),
        ("evaluate.metrics=[clip_image]", "a choice needs clip_text"),
        ("evaluate.clip=/no/clip", "The CLIP /no/clip cannot be loaded"),
        ("evaluate.scorers=[dinno=x]", 'did you mean "dino"'),
        ("evaluate.scorers=[dino]", "'dino' does not give a model"),
        ("evaluate.scorers=[dino=/no/dino]", "dino=/no/dino cannot be loaded"),
        ("evaluate.metrics=[clip_text, clip_image, dino_image]", "add evaluate.scorers=[dino=NAME]"),
        ("evaluate.patience=2", "set evaluate.every_steps"),
        ("evaluate.class_words=cat", "fills {class} of evaluate.prompts"),
    ],
)
def test_bad_settings_are_told_before_training(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path, override: str, message: str
) -> None:
    run = tmp_path / "run"
    outcome = command("train", *settings(tiny_base, images, run), "evaluate.after_training=true", override)
    assert outcome.code == 2
    assert message in outcome.message
    assert not run.exists()


def test_bad_references_are_told_before_training(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    references = shutil.copytree(images, tmp_path / "references")
    (references / "._0.png").write_bytes(b"left by macOS")
    arguments = [*settings(tiny_base, images, tmp_path / "run"), f"evaluate.references={references}"]
    arguments += ["evaluate.every_steps=1", "train.max_steps=1"]
    command.good("train", *arguments, "--dry-run")

    for file in references.glob("*.txt"):
        file.unlink()
    message = command("train", *arguments, "--dry-run").message
    assert f"evaluate.references={references}: its captions would be the prompts" in message
    for name in ("0.png", "1.png"):
        (references / name).write_bytes(b"no picture")
    message = command("train", *arguments, "evaluate.prompts=style").message
    assert f"evaluate.references={references}: 2 of 4 images cannot be read" in message
    assert "- 0.png" in message
    assert "- 1.png" in message
    assert not (tmp_path / "run").exists()


def test_run_ends_early_and_stays_ended(command: Commands, tiny_base: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["train", *settings(tiny_base, images, tmp_path / "run"), "train.max_steps=40"]
    # No images are better than those of noise, so that the score never rises above its first value for long.
    arguments += ["evaluate.every_steps=1", "evaluate.patience=2", "evaluate.picture_draws=0"]
    result = json.loads(command.good(*arguments, "--json").out)
    scores = json.loads((tmp_path / "run" / "progress.json").read_text())
    assert [entry["step"] for entry in scores] == list(range(1, result["steps"] + 1))
    assert result["steps"] < 40
    best = max(range(len(scores)), key=lambda index: scores[index]["score"])
    assert len(scores) - 1 - best == 2
    again = json.loads(command.good(*arguments, "--resume", "--json").out)
    assert again["steps"] == result["steps"]


def test_report_of_a_run_its_evaluation_and_a_comparison(command: Commands, selected: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    files = json.loads(command.good("report", selected, "--output", page, "--json").out)
    assert files == {"page": str(page), "numbers": [str(tmp_path / "run.json"), str(tmp_path / "run.csv")]}
    html = page.read_text()
    for part in ("Recommended:", "Training images", "train.max_steps", "evaluate.references", "copying"):
        assert part in html
    losses = json.loads(page.with_suffix(".json").read_text())["training"]["losses"]
    assert [each["key"] for each in losses] == ["0.png", "1.png", "2.png", "3.png"]
    other = shutil.copytree(selected, tmp_path / "other", symlinks=True)
    command.good("report", selected, other, "--output", tmp_path / "both.html")
    assert "run against other" in (tmp_path / "both.html").read_text()
    command.good("report", selected / "evaluation", "--output", tmp_path / "alone.html")
    assert "Training images" not in (tmp_path / "alone.html").read_text()
    assert "neither a run" in command("report", tmp_path).message
    assert "ends in .html" in command("report", selected, "--output", tmp_path / "x.pdf").message


def test_wrong_caption_and_odd_image_are_found(command: Commands, tmp_path: Path) -> None:
    data = shipped_path("datasets")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for image in sorted((data / "blob-style" / "train").glob("*.png"))[:6]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, folder)
    wrong, odd = sorted(folder.glob("*.png"))[3:5]
    right = folder / "right.png"
    for suffix in (".png", ".txt"):
        shutil.copy(wrong.with_suffix(suffix), right.with_suffix(suffix))
    wrong.with_suffix(".txt").write_text("blob style drawing of a red car\n")
    shutil.copy(sorted((data / "octopus" / "train").glob("*.png"))[0], odd)
    arguments = [f"data.path={folder}", f"output.path={tmp_path / 'run'}", "train.max_steps=1", "train.batch_size=6"]
    arguments += ["adapter.rank=1", "train.threads=1", "train.warmup_steps=0", "evaluate.picture_draws=32"]
    command.good("train", "--config", "sd1/style", *arguments)
    losses = json.loads((tmp_path / "run" / "picture_losses.json").read_text())
    ranked = sorted(losses, key=lambda own: own["caption_help"])
    assert ranked[0]["key"] == odd.name
    # What a caption is worth depends on the image too, so the same image is there with its own.
    place = [own["key"] for own in ranked]
    assert place.index(wrong.name) < place.index(right.name)
    assert sum(own["loss"] for own in losses) / len(losses) == pytest.approx(1, abs=0.02)
