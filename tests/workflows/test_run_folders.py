"""What a run folder may lose, gain and outlive: files of others, moves, other places, checkpoints as files."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_diffusion.cli.main import main
from lora_diffusion.training import run_files
from tests.workflows.conftest import Commands, fill_with_images


def settings(base: Path, images: object, run: object) -> list[str]:
    return [
        f"model.path={base}",
        f"data.path={images}",
        f"output.path={run}",
        "output.dtype=fp32",
        "adapter.rank=2",
        "train.max_steps=4",
        "train.save_every_steps=1",
        "train.keep_checkpoints=2",
        "train.learning_rate=3e-2",
        "train.schedule=constant",
        "train.precision=fp32",
        "train.threads=1",
        "evaluate.picture_draws=0",
    ]


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with images and a run that wrote its adapter after each second step; never changed."""
    root = tmp_path_factory.mktemp("project")
    fill_with_images(root / "photos")
    extra = ["output.name=a", "output.formats=[kohya, peft]", "train.save_adapter_every_steps=2"]
    with redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", *settings(tiny_base, "photos", "runs/one"), *extra]) == 0
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "project", symlinks=True)


class TestOverwrite:
    """Only what the record names goes."""

    OTHERS = (
        "a-step-mine.safetensors",
        "a-step-000002.safetensors",
        "a-000099.safetensors",
        "a-final.safetensors",
        "b.safetensors",
        "best.safetensors",
        "report.html",
        "report.json",
        "notes.txt",
        "checkpoints/notes.txt",
        "checkpoints/step-mine/adapter.safetensors",
        "checkpoints/step-000002/adapter.safetensors",
        "checkpoints/step-000004/why.txt",
        "previews/mine.png",
        "evaluation/notes.md",
        "a.peft/README.md",
        "tensorboard/notes.txt",
    )

    def test_keeps_files_of_others(self, command: Commands, tiny_base: Path, project: Path) -> None:
        run = project / "runs/one"
        for name in self.OTHERS:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_text("mine")
        arguments = ["train", *settings(tiny_base, project / "photos", run), "train.max_steps=1", "output.name=a"]
        outcome = command.good(*arguments, "--overwrite")
        assert {name: (run / name).read_text() for name in self.OTHERS} == dict.fromkeys(self.OTHERS, "mine")
        assert "Kept in" in outcome.message
        left = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()} - {*self.OTHERS}
        checkpoint = {f"checkpoints/step-000001/{name}.safetensors" for name in ("adapter", "optimizer")}
        assert left == {
            *("a.safetensors", "config.yaml", "files.json", "plan.json", "metadata.json", "metrics.jsonl", ".lock"),
            *(checkpoint | {"checkpoints/step-000001/state.json"}),
        }

    @pytest.mark.parametrize("record", [None, b"\x00\x00", b"[]", b'{"files": ["../../photos"]}', b'{"files": 5}'])
    def test_of_a_run_without_record_takes_what_is_surely_its_own(
        self, project: Path, record: bytes | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = project / "runs/one"
        (run / "files.json").unlink() if record is None else (run / "files.json").write_bytes(record)
        (run / "a-step-mine.safetensors").write_text("mine")
        run_files.remove_all(run, ["a.safetensors", "a.peft"])
        left = {path.name for path in run.iterdir()}
        assert left == {".lock", "a-step-mine.safetensors"} | {
            f"a-00000{step}{ending}" for step in (2, 4) for ending in (".safetensors", ".peft")
        }
        assert ("is damaged" in caplog.text) == (record is not None)
        assert len(list((project / "photos").iterdir())) == 8

    def test_and_resume_refuse_names_of_others(self, command: Commands, tiny_base: Path, project: Path) -> None:
        run = project / "runs/one"
        arguments = ["train", *settings(tiny_base, project / "photos", run), "train.max_steps=6", "--dry-run"]
        (run / "b.safetensors").write_text("mine")
        (run / "a-000006.safetensors").write_text("mine")
        for how in ("--overwrite", "--resume"):
            outcome = command(*arguments, how, "output.name=b")
            assert (outcome.code, "b.safetensors, which this run did not write" in outcome.message) == (2, True)
            outcome = command(*arguments, how, "output.name=a", "train.save_adapter_every_steps=2")
            assert (outcome.code, "a-000006.safetensors, which" in outcome.message) == (2, True)
            command.good(*arguments, how, "output.name=a")


def test_checkpoints_of_others_are_not_pruned(command: Commands, tiny_base: Path, project: Path) -> None:
    run = project / "runs/one"
    shutil.copytree(run / "checkpoints/step-000003", run / "checkpoints/step-000001")
    arguments = ["train", *settings(tiny_base, project / "photos", run), "output.name=a", "train.max_steps=6"]
    command.good(*arguments, "--resume")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000005",
        "step-000006",
    ]
    assert (run / "a-000002.safetensors").is_file()


class TestResume:
    """Content decides, not where it lies or how it is spelled."""

    @pytest.mark.parametrize("path", ["photos/", "./photos", "../project/photos", "{root}/photos"])
    def test_with_another_spelling_of_the_folder(
        self, command: Commands, tiny_base: Path, project: Path, path: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(project)
        arguments = settings(tiny_base, path.format(root=project), "runs/one/")
        outcome = command.good("train", *arguments, "output.name=a", "--resume", "--dry-run")
        assert "Nothing was trained" in outcome.out

    def test_after_data_run_and_base_were_moved(self, command: Commands, tiny_base: Path, project: Path) -> None:
        (project / "photos").rename(project / "pictures")
        run = (project / "runs/one").rename(project / "two")
        base = shutil.copytree(tiny_base, project / "base")
        arguments = ["train", *settings(base, project / "pictures", run), "train.max_steps=5"]
        free = ["train.gradient_checkpointing=true", "train.save_adapter_every_epochs=1", "train.keep_checkpoints=0"]
        outcome = command.good(*arguments, *free, "--resume")
        assert "Continuing after step 4" in outcome.message
        assert (run / "two.safetensors").is_file()

    def test_with_other_content_is_refused(self, command: Commands, tiny_base: Path, project: Path) -> None:
        base = shutil.copytree(tiny_base, project / "base")
        file = base / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        name = min(tensors)
        tensors[name] = tensors[name] + 1
        safe = {key: value.contiguous() for key, value in tensors.items()}
        from safetensors.torch import save_file

        save_file(safe, file)
        arguments = ["train", *settings(base, project / "photos", project / "runs/one"), "output.name=a", "--resume"]
        outcome = command(*arguments)
        assert (outcome.code, "networks:" in outcome.message) == (2, True)


def test_settings_that_may_change_are_listed_once() -> None:
    from lora_diffusion.config.describe import fixed_differences
    from lora_diffusion.config.load import load

    given = ["data.path=a", "output.path=b", "model.path=c"]
    one = load(None, given)
    free = ["train.gradient_checkpointing=true", "train.epochs=3", "preview.num_steps=3", "evaluate.seeds=[5]"]
    free += ["data.path=x", "model.path=y", "output.path=z", "cache.path=w", "train.save_adapter_every_steps=5"]
    assert fixed_differences(one, load(None, [*given, *free])) == []
    assert len(fixed_differences(one, load(None, [*given, "train.seed=1", "adapter.rank=3", "data.flip=true"]))) == 3


class TestOtherWorkingDirectory:
    """A run that was started with relative paths finds what they meant."""

    def test_finds_training_images(
        self, project: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lora_diffusion.training.run_folder import RunFolder

        elsewhere = fill_with_images(tmp_path / "elsewhere" / "photos", count=1)
        monkeypatch.chdir(elsewhere.parent)
        assert RunFolder(made / "runs/one").config().data.path == str(made / "photos")
        # The project was copied; where it was started is still there, and is looked at first.
        assert RunFolder(project / "runs/one").config().data.path == str(made / "photos")
        record = json.loads((project / "runs/one/files.json").read_text())
        for result in (None, "/nowhere", 5, "a\0b"):
            (project / "runs/one/files.json").write_text(json.dumps({**record, "started_in": result}))
            assert RunFolder(project / "runs/one").config().data.path == str(project / "photos")
        overridden = RunFolder(project / "runs/one").config(["evaluate.references=photos"])
        assert overridden.evaluate.references == "photos"
        monkeypatch.chdir(made)
        assert RunFolder(made / "runs/one").config().data.path == "photos"

    def test_report_and_evaluation_find_images(
        self, command: Commands, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = project / "runs/one"
        (tmp_path / "elsewhere").mkdir()
        losses = [{"key": "0.png", "path": "photos/0.png", "caption": "a", "loss": 1.0, "caption_help": 0.5}]
        (run / "picture_losses.json").write_text(json.dumps(losses))
        monkeypatch.chdir(tmp_path / "elsewhere")
        command.good("report", run)
        assert "data:image/webp" in (run / "report.html").read_text()
        assert str(project) not in (run / "report.json").read_text()
        record = json.loads((run / "files.json").read_text())["files"]
        assert {"report.html", "report.json", "report.csv"} <= {*record}

    def test_renamed_run_finds_its_adapter(self, tmp_path: Path, command: Commands, trained: Path) -> None:
        run = shutil.copytree(trained, tmp_path / "renamed", symlinks=True)
        target = tmp_path / "a.safetensors"
        command.good("export", run, "--to", "kohya", "--output", target)
        assert load_file(target).keys() == load_file(trained / "run.safetensors").keys()


class TestAdapterFiles:
    """A file for each checkpoint."""

    def test_are_written_while_training(self, made: Path) -> None:
        run = made / "runs/one"
        assert sorted(path.name for path in run.glob("a-*")) == [
            "a-000002.peft",
            "a-000002.safetensors",
            "a-000004.peft",
            "a-000004.safetensors",
        ]
        last, final = load_file(run / "a-000004.safetensors"), load_file(run / "a.safetensors")
        assert all(torch.equal(tensor, last[name]) for name, tensor in final.items())
        with safe_open(run / "a-000002.safetensors", "pt") as file:
            result = file.metadata()
        assert (result["ss_steps"], result["ss_output_name"], result["modelspec.title"]) == (
            "2",
            "a-000002",
            "a-000002",
        )
        assert (result["ss_epoch"], result["ss_num_epochs"]) == ("1", "1")

    def test_do_not_change_the_training(self, command: Commands, tiny_base: Path, made: Path, tmp_path: Path) -> None:
        arguments = ["train", *settings(tiny_base, made / "photos", tmp_path / "plain"), "output.name=a"]
        epochs = ["train.max_steps=8", "train.save_adapter_every_epochs=1"]
        command.good(*arguments)
        plain, other = load_file(tmp_path / "plain/a.safetensors"), load_file(made / "runs/one/a.safetensors")
        assert all(torch.equal(tensor, plain[name]) for name, tensor in other.items())
        command.good(*arguments, *epochs, "--resume")
        assert [path.name for path in (tmp_path / "plain").glob("a-*")] == ["a-000002.safetensors"]

    def test_by_steps_and_by_epochs_are_refused_together(self, command: Commands, tiny_base: Path) -> None:
        both = ["train.save_adapter_every_steps=1", "train.save_adapter_every_epochs=1"]
        outcome = command("train", *settings(tiny_base, "p", "o"), *both)
        assert (outcome.code, "give one of the two" in outcome.message) == (2, True)

    @pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft"])
    def test_are_exported_from_checkpoints(
        self, command: Commands, made: Path, tmp_path: Path, format_name: str
    ) -> None:
        run = made / "runs/one"
        one, two = tmp_path / ("one" if format_name == "peft" else "one.safetensors"), tmp_path / "two.safetensors"
        command.good("export", run, "--step", 4, "--to", format_name, "--output", one)
        command.good("convert", one, two, "--to", "kohya")
        actual, final = load_file(two), load_file(run / "a.safetensors")
        assert all(torch.equal(tensor, actual[name]) for name, tensor in final.items())

    def test_are_exported_by_the_path_of_a_checkpoint(self, command: Commands, made: Path, tmp_path: Path) -> None:
        folder = made / "runs/one/checkpoints/step-000003"
        for source in (folder, folder / "adapter.safetensors"):
            command.good("export", source, "--to", "kohya", "--output", tmp_path / "a.safetensors", "--overwrite")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata()["ss_steps"] == "3"
            assert file.metadata()["ss_base_model_version"] == "sd_v1"
        outcome = command("export", made / "runs/one", "--step", 1, "--to", "kohya", "--output", tmp_path / "b")
        assert (outcome.code, "there are 3, 4" in outcome.message) == (2, True)
        assert command("export", folder, "--step", 4, "--to", "kohya", "--output", tmp_path / "b").code == 2

    def test_of_a_run_that_has_not_finished(self, command: Commands, project: Path, tmp_path: Path) -> None:
        run = project / "runs/one"
        for name in ("a.safetensors", "metadata.json", "plan.json"):
            (run / name).unlink()
        shutil.rmtree(run / "a.peft")
        command.good("export", run, "--step", 4, "--to", "kohya", "--output", tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            assert file.metadata()["ss_base_model_version"] == "sd_v1"


class TestCheckpointAsAdapter:
    """Where an adapter file may be named, a checkpoint may be."""

    @pytest.fixture(params=["", "/adapter.safetensors"])
    def checkpoint(self, made: Path, request: pytest.FixtureRequest) -> str:
        return f"{made}/runs/one/checkpoints/step-000004{request.param}"

    def test_inspect_verify_convert_resize_compose(
        self, command: Commands, checkpoint: str, tiny_base: Path, tmp_path: Path
    ) -> None:
        report = json.loads(command.good("inspect", checkpoint, "--json").out)
        assert (report["format"], report["family"], report["path"]) == ("checkpoint", "sd1", checkpoint)
        assert report["problems"] == []
        assert json.loads(command("verify", checkpoint, "--base", tiny_base, "--json").out)["file"] == checkpoint
        result = json.loads(
            command.good("convert", checkpoint, tmp_path / "a.safetensors", "--to", "kohya", "--json").out
        )
        assert (result["from"], result["dtype"], result["rounding"]) == ("checkpoint", "fp32", 0)
        command.good("resize", checkpoint, tmp_path / "b.safetensors", "--rank", 1)
        command.good("compose", f"{checkpoint}:0.5", tmp_path / "a.safetensors", "--output", tmp_path / "c.safetensors")

    def test_merge_generate_evaluate(
        self, command: Commands, checkpoint: str, made: Path, tiny_base: Path, tmp_path: Path
    ) -> None:
        adapter = ("--adapter", f"{checkpoint}:0.5")
        command.good("merge", "--model", tiny_base, *adapter, "--output", tmp_path / "merged")
        arguments = ("--model", tiny_base, "--prompt", "a cat", "--steps", 1)
        for name, each in (("one", adapter), ("two", ("--adapter", f"{made}/runs/one/a.safetensors:0.5"))):
            command.good("generate", *arguments, *each, "--output", tmp_path / name)
        assert (tmp_path / "one/grid.png").read_bytes() == (tmp_path / "two/grid.png").read_bytes()

    def test_of_no_run_is_refused_in_one_line(self, command: Commands, checkpoint: str, tmp_path: Path) -> None:
        source = Path(checkpoint) if Path(checkpoint).is_dir() else Path(checkpoint).parent
        alone = shutil.copytree(source, tmp_path / "x" / "y" / source.name)
        outcome = command("convert", alone, tmp_path / "a.safetensors", "--to", "kohya")
        assert (outcome.code, "its run is not around it" in outcome.message) == (2, True)

    def test_that_is_damaged_is_refused(self, command: Commands, project: Path, tmp_path: Path) -> None:
        folder = project / "runs/one/checkpoints/step-000004"
        content = bytearray((folder / "adapter.safetensors").read_bytes())
        content[-3] ^= 1
        (folder / "adapter.safetensors").write_bytes(content)
        outcome = command("convert", folder, tmp_path / "a.safetensors", "--to", "kohya")
        assert (outcome.code, "has a damaged adapter.safetensors" in outcome.message) == (1, True)
