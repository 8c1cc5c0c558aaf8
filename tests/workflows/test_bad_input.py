"""What people get wrong: exit code 2, one message that says what to do, and no base model was loaded."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from lora_diffusion.families.sd1 import FAMILY
from lora_diffusion.training.run_folder import RunFolder
from tests.workflows.conftest import Commands


@pytest.fixture(autouse=True)
def _no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        pytest.fail("the base model was loaded although the input is bad")

    monkeypatch.setattr(type(FAMILY), "load", load)


class Training:
    """`lora-diffusion train` on good input, which tests then spoil."""

    def __init__(self, command: Commands, base: Path, images: Path, output: Path) -> None:
        self.command, self.base, self.images, self.output = command, base, images, output

    def refused(self, *arguments: str) -> str:
        """Trains, checks that it is refused before anything is written, and returns the message."""
        before = _contents(self.output)
        paths = [f"model.path={self.base}", f"data.path={self.images}", f"output.path={self.output}"]
        outcome = self.command("train", *paths, "adapter.rank=2", *arguments)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        assert outcome.err.count("lora-diffusion train:") == 1
        assert _contents(self.output) == before
        return outcome.message


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def training(command: Commands, tiny_base: Path, images: Path, tmp_path: Path) -> Training:
    return Training(command, tiny_base, images, tmp_path / "run")


@pytest.fixture
def base_copy(training: Training, tmp_path: Path) -> Path:
    """A copy of the base, to be damaged."""
    training.base = Path(shutil.copytree(training.base, tmp_path / "own base"))
    return training.base


def test_folder_that_does_not_exist(training: Training, tmp_path: Path) -> None:
    training.images = tmp_path / "nowhere"
    message = training.refused()
    assert f"data.path={tmp_path}/nowhere" in message
    assert "correct the path" in message


def test_empty_folder(training: Training, tmp_path: Path) -> None:
    training.images = tmp_path / "empty"
    training.images.mkdir()
    assert "hold no images" in training.refused()


def test_all_errors_of_the_data_at_once(training: Training) -> None:
    whole = (training.images / "0.png").read_bytes()
    (training.images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (training.images / "cut.txt").write_text("a cut cat, sks style")
    (training.images / "zero.jpg").write_bytes(b"")
    (training.images / "zero.txt").write_text("a zero cat, sks style")
    (training.images / "words.png").write_text("not a picture")
    (training.images / "words.txt").write_text("sks style words")
    (training.images / "1.txt").write_bytes("un chat rouge, sks style, frisé".encode("latin-1"))
    (training.images / "2.txt").unlink()
    message = training.refused("data.trigger=")
    for name, reason in {
        "cut.png": "damaged or cut off",
        "zero.jpg": "is empty (0 bytes)",
        "words.png": "is no png",
        "1.txt": "is not UTF-8",
        "2.png": "has no caption",
    }.items():
        assert f"- {name}" in message
        assert reason in message
    assert "5 errors" in message


def test_no_captions_at_all(training: Training) -> None:
    for file in training.images.glob("*.txt"):
        file.unlink()
    message = training.refused()
    assert "None of the 4 images has a caption" in message
    assert "data.captions=optional" in message


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train.max_step=5"], ['train.max_step: there is no such key (did you mean "train.max_steps"']),
        (["train.max_steps=many"], ["train.max_steps='many'", "whole number"]),
        (['train.max_steps="500"'], ["train.max_steps='500'", "whole number"]),
        (["data.flip=5"], ["data.flip=5", "true or false"]),
        (["train.warmup_steps=1000"], ["train.warmup_steps=1000", "1000 steps"]),
        (["preview.num_steps=1000"], ["preview.num_steps=1000: must be from 1 to 999"]),
        (["train.max_steps=2.5"], ["train.max_steps=2.5", "whole number"]),
        (["train.learning_rate=0"], ["train.learning_rate=0", "greater than 0"]),
        (["train.learning_rate=.nan"], ["train.learning_rate=nan"]),
        (["train.learning_rate=.inf"], ["train.learning_rate=inf"]),
        (["adapter.rank=0"], ["adapter.rank=0: must be 1 or greater"]),
        (["adapter.rank=33"], ["adapter.rank=33 is larger than", "the largest rank that fits all of them is 32"]),
        (["adapter.module_ranks=attn"], ["adapter.module_ranks: 'attn' must be TARGET=VALUE"]),
        (["adapter.module_ranks=atn=8"], ['adapter.module_ranks: "atn" matches no', 'did you mean "attn"']),
        (["adapter.module_ranks=ff=8"], ['"ff" matches no trained module of unet. Use a group (attn']),
        (["adapter.module_ranks=[unet/attn=8, attn=4]"], ['"unet/attn=8" acts on no module']),
        (["adapter.module_ranks=attn=33"], ['"attn=33" is larger than', "fits all of them is 32"]),
        (["adapter.module_alphas=attn=-1"], ["'attn=-1' must be TARGET=VALUE, the value a number greater than 0"]),
        (["train.module_learning_rates=re:.*to_=1e-4"], ['train.module_learning_rates: "re:.*to_" matches no trained']),
        (["train.module_learning_rates=attn=nan"], ["train.module_learning_rates: 'attn=nan' must be"]),
        (["adapter.targets=atn"], ['"atn" matches no module', 'did you mean "attn"']),
        (["adapter.targets=re:*"], ["is not a regular expression"]),
        (["adapter.targets=re:.*norm1"], ["cannot hold an adapter"]),
        (["adapter.parts=[unet, tex_encoder]"], ["tex_encoder", 'did you mean "text_encoder"']),
        (["adapter.variant=lorra"], ["adapter.variant=lorra", "write lora"]),
        (["data.resolution=18"], ["data.resolution=18", "use 16 or 20"]),
        (["data.trigger=zwx"], ['data.trigger="zwx" is in none of the 4 captions']),
        (["model.path=builtin:nothing"], ["builtin:nothing", "builtin:emoji"]),
        (["model.path=/no/such/base"], ["/no/such/base", "there is no such folder or file"]),
        (["model.path=someone/no-such-model"], ["someone/no-such-model", "neither a folder or file here nor"]),
        (["model.family=sd9"], ["'sd9'", "sd1"]),
        (["train.optimizer=paged_adamw8bit"], ["train.optimizer=paged_adamw8bit", "use adamw or adamw8bit"]),
        (["train.max_steps=10", "train.epochs=2"], ["give one of the two"]),
        (["train.max_steps=10", "train.warmup_steps=10"], ["train.warmup_steps=10"]),
        (["train.text_encoder_learning_rate=1e-4"], ["text_encoder"]),
        (["preview.prompts=[a cat]"], ["preview.prompts", "train.preview_every_steps"]),
        (["train.preview_every_steps=2", "preview.seeds=[-1]"], ["preview.seeds=[-1]"]),
        (["preview.seeds=[1]"], ["preview.seeds", "train.preview_every_steps"]),
        (["preview.negative=a dog", "preview.guidance=1"], ["preview.negative: does nothing at preview.guidance=1"]),
        (["train.epochs=1", "train.warmup_steps=4"], ["train.warmup_steps=4: must be less than the 4 steps"]),
        (
            ["train.max_steps=2", "train.preview_every_steps=3", "output.thumbnail=preview"],
            ["output.thumbnail=preview: no preview is generated in 2 steps"],
        ),
        ([f"output.name={'n' * 201}"], ["has 201 bytes; give one of at most 200"]),
        (["train.threads=²"], ["train.threads=²: must be auto or a number"]),
        (["output.formats=[kohia]"], ["output.formats"]),
        (["output.name=a/b"], ["output.name=a/b"]),
        (["--config", "/no/such.yaml"], ["no config file /no/such.yaml"]),
        (["trian"], ["'trian' is not an override"]),
        (["train.max_steps=[1"], ["train.max_steps=[1"]),
        (["--resume", "--overwrite"], ["give one of the two"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_settings(training: Training, arguments: list[str], fragments: list[str]) -> None:
    message = training.refused(*arguments)
    for fragment in fragments:
        assert fragment in message


def test_all_errors_of_the_config_at_once(training: Training) -> None:
    message = training.refused("train.sed=1", "adapter.rank=big", "data.flip=perhaps", "train.batch_size=0")
    for name in ("train.sed", "adapter.rank", "data.flip", "train.batch_size"):
        assert f"- {name}" in message
    assert "4 error(s)" in message


def test_all_errors_of_a_run_at_once(training: Training) -> None:
    (training.images / "0.png").write_bytes(b"")
    training.output.mkdir()
    (training.output / "other").touch()
    settings = ["train.optimizer=paged_adamw8bit", "adapter.targets=atn", "output.thumbnail=/no/picture.png"]
    for dry in ([], ["--dry-run"]):
        message = training.refused(*settings, *dry)
        assert "train found 5 errors; nothing was done" in message
        for fragment in ("0.png: is empty", "holds other files", "paged_adamw8bit", '"atn"', "/no/picture.png"):
            assert fragment in message


def test_file_names_that_are_not_utf8(training: Training) -> None:
    shutil.copy(training.images / "0.png", os.fsencode(training.images) + b"/gr\xfcn.png")
    message = training.refused()
    assert "1 file name(s) are not UTF-8; rename them" in message
    assert r"b'gr\xfcn.png'" in message


def test_what_only_a_file_says_gives_way(
    training: Training, tmp_path: Path, command: Commands, caplog: pytest.LogCaptureFixture
) -> None:
    """The steps that epochs make are known once the data are read; the run is resumed with the same command."""
    path = tmp_path / "c.yaml"
    path.write_text("train: {max_steps: 350, warmup_steps: 10, save_every_steps: 1}")
    paths = [f"model.path={training.base}", f"data.path={training.images}", f"output.path={training.output}"]
    outcome = command.good("train", "--config", path, *paths, "adapter.rank=2", "train.epochs=1", "--dry-run")
    assert "gives way to train.epochs=1; it is null now" in caplog.text
    assert "train.warmup_steps=10 of the config gives way to train.epochs=1; it is 0 now" in outcome.message
    result = training.refused("--config", str(path), "train.epochs=1", "train.warmup_steps=10")
    assert "train.warmup_steps=10: must be less than the 4 steps" in result


def test_data_check_of_a_config_without_base(training: Training, tmp_path: Path, command: Commands) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{path: '{training.images}'}}")
    assert "No errors." in command.good("data", "check", "--config", path).out
    path.write_text(f"model: {{family: sdxl}}\ndata: {{path: '{training.images}'}}")
    outcome = command("data", "check", "--config", path)
    assert outcome.code == 2
    assert "model.path must be given" in outcome.message


def test_config_file_that_is_not_yaml(training: Training, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: [")
    message = training.refused("--config", str(path))
    assert "bad.yaml is not a YAML file" in message
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "bad.yaml is not a YAML file" in training.refused("--config", str(path))
    path.write_text("just words")
    assert "bad.yaml" in training.refused("--config", str(path))
    path.write_text("train:\n  seed: 1\n  seed: 2\n")
    assert "bad.yaml" in training.refused("--config", str(path))


class TestBase:
    @pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
    def test_without_a_component(self, training: Training, base_copy: Path, component: str) -> None:
        shutil.rmtree(base_copy / component)
        message = training.refused()
        assert str(base_copy / component) in message

    def test_weights_that_are_cut_off(self, training: Training, base_copy: Path) -> None:
        weights = base_copy / "unet" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        message = training.refused()
        assert str(weights) in message
        assert "cut off" in message

    def test_weights_that_lack_a_tensor(self, training: Training, base_copy: Path) -> None:
        path = base_copy / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        del tensors["conv_in.weight"]
        save_file(tensors, path)
        message = training.refused()
        assert "lacks 1 tensors" in message
        assert "conv_in.weight" in message

    @pytest.mark.parametrize("weights", ["vae/diffusion_pytorch_model", "text_encoder/model"])
    def test_another_network_that_lacks_tensors(self, training: Training, base_copy: Path, weights: str) -> None:
        path = base_copy / f"{weights}.safetensors"
        tensors = load_file(path)
        gone = sorted(tensors)[:12]
        save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, path)
        for arguments in ((), ("--dry-run",)):
            message = training.refused(*arguments)
            assert "lacks 12 tensors" in message
            assert message.count(f"- {weights.split('/')[0]}/") == 10

    def test_git_lfs_pointer(self, training: Training, base_copy: Path) -> None:
        weights = base_copy / "vae" / "diffusion_pytorch_model.safetensors"
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "git lfs pull" in training.refused()

    def test_pickled_weights_only(self, training: Training, base_copy: Path) -> None:
        weights = base_copy / "text_encoder" / "model.safetensors"
        weights.rename(weights.with_name("pytorch_model.bin"))
        assert "pickled weights" in training.refused()

    @pytest.mark.parametrize("text", ["{", "[1, 2]", "", "{}"])
    def test_broken_component_config(self, training: Training, base_copy: Path, text: str) -> None:
        config = base_copy / "unet" / "config.json"
        config.write_text(text)
        message = training.refused()
        assert str(base_copy) in message

    def test_config_with_impossible_values(self, training: Training, base_copy: Path) -> None:
        _change(base_copy / "unet" / "config.json", down_block_types=["NoSuchBlock2D"] * 2)
        assert "NoSuchBlock2D" in training.refused()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"addition_embed_type": "text_time", "cross_attention_dim": 2048}, "Stable Diffusion XL"),
            ({"cross_attention_dim": 1024}, "Stable Diffusion 2"),
            ({"in_channels": 9}, "inpainting"),
        ],
    )
    def test_of_another_family(self, training: Training, base_copy: Path, change: dict, message: str) -> None:
        _change(base_copy / "unet" / "config.json", **change)
        assert message in training.refused()

    def test_folder_of_images(self, training: Training) -> None:
        training.base = training.images
        assert "is not a complete Stable Diffusion 1.x folder" in training.refused()

    def test_folder_with_a_checkpoint_file(self, training: Training, tmp_path: Path) -> None:
        training.base = tmp_path / "models"
        training.base.mkdir()
        (training.base / "v1-5.safetensors").write_bytes(b"")
        assert f"model.path={training.base / 'v1-5.safetensors'}" in training.refused()

    def test_file_that_is_an_adapter(self, training: Training, trained: Path) -> None:
        training.base = trained / "run.safetensors"
        assert "a LoRA adapter, not a base" in training.refused()

    def test_pickled_checkpoint(self, training: Training, tmp_path: Path) -> None:
        training.base = tmp_path / "model.ckpt"
        training.base.write_bytes(pickle.dumps({}))
        assert "is a pickle" in training.refused()

    def test_empty_checkpoint(self, training: Training, tmp_path: Path) -> None:
        training.base = tmp_path / "model.safetensors"
        training.base.write_bytes(b"")
        assert "is not a whole .safetensors file" in training.refused()


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _base_of(run: Path) -> str:
    return RunFolder(run).config().model.path


def _settings_of(run: Path) -> list[str]:
    return ["--config", str(run / "config.yaml"), f"data.path={RunFolder(run).config().data.path}", "adapter.rank=4"]


class TestOutputFolder:
    def _copy_of_a_run(self, training: Training, trained: Path) -> None:
        shutil.copytree(trained, training.output)

    def test_holds_another_run(self, training: Training, trained: Path) -> None:
        self._copy_of_a_run(training, trained)
        message = training.refused()
        for word in ("output.path=", "--resume", "--overwrite"):
            assert word in message

    def test_resume_with_other_settings_names_them(self, training: Training, trained: Path) -> None:
        self._copy_of_a_run(training, trained)
        message = training.refused("--resume", "train.seed=7")
        assert "- train.seed: 0 -> 7" in message
        assert "- adapter.rank: 4 -> 2" in message

    def test_resume_with_fewer_steps_than_were_made(self, training: Training, trained: Path) -> None:
        self._copy_of_a_run(training, trained)
        message = training.refused(*_settings_of(trained), "--resume", "train.max_steps=5")
        assert "has made 8 steps already and cannot be continued as one of 5" in message

    @pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"])
    def test_resume_on_a_changed_base(self, training: Training, base_copy: Path, trained: Path, file: str) -> None:
        self._copy_of_a_run(training, trained)
        config = training.output / "config.yaml"
        config.write_text(config.read_text().replace(str(_base_of(trained)), str(base_copy)))
        path = base_copy / file
        if path.suffix == ".json":
            _change(path, beta_end=0.02)
        else:
            save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
        message = training.refused(*_settings_of(training.output), "--resume")
        assert "networks: " in message

    def test_holds_other_files(self, training: Training) -> None:
        training.output.mkdir()
        (training.output / "thesis.doc").write_text("years of work")
        assert "holds other files" in training.refused()
        assert "holds other files" in training.refused("--overwrite")
        assert "holds other files" in training.refused("--resume")

    def test_holds_a_config_of_another_program(self, training: Training) -> None:
        training.output.mkdir()
        (training.output / "config.yaml").write_text("theme: minima\n")
        (training.output / "thesis.doc").write_text("years of work")
        assert "holds a run already" in training.refused()
        assert "theme: there is no such section" in training.refused("--overwrite")

    def test_is_a_file(self, training: Training) -> None:
        training.output.write_text("")
        assert "is a file" in training.refused()

    def test_lies_below_a_file(self, training: Training, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        training.output = tmp_path / "file" / "run"
        assert f"{tmp_path / 'file'} is a file" in training.refused()

    def test_another_process_trains_into_it(self, training: Training) -> None:
        with FileLock(training.output / ".lock"):
            assert "another process is training into it" in training.refused()

    def test_cannot_be_written(self, training: Training) -> None:
        training.output = Path("/proc/run")
        assert "output.path=/proc/run" in training.refused()

    def test_lies_in_the_data(self, training: Training) -> None:
        training.output = training.images / "run"
        assert "lies inside data.path" in training.refused()

    def test_cache_cannot_be_written(self, training: Training, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert f"cache.path={tmp_path / 'file'}" in training.refused(f"cache.path={tmp_path / 'file'}")

    def test_dry_run_says_the_same(self, training: Training, trained: Path) -> None:
        self._copy_of_a_run(training, trained)
        assert "- adapter.rank: 4 -> 2" in training.refused("--dry-run")


Spoil = Callable[[Path], None]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def _for_sdxl(path: Path) -> None:
    tensors = load_file(path)
    old = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    new = old.replace("blocks_0_attn1", "blocks_9_attn1")
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, path)


def _wider(path: Path) -> None:
    tensors = load_file(path)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    save_file(tensors | {name: tensors[name].repeat(1, 2)}, path)


def _not_a_number(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] * float("nan")}, path)


class TestGenerate:
    def refused(self, command: Commands, base: Path, *arguments: object) -> str:
        outcome = command("generate", "--model", base, "--prompt", "a cat", "--steps", 1, *arguments)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        return outcome.message

    @pytest.mark.parametrize(
        ("spoil", "reason"),
        [
            (_cut, "is damaged"),
            (_empty, "is damaged: it is empty"),
            (_pickle, "is a pickle"),
            (_for_sdxl, "made for another architecture"),
            (_wider, "does not fit this base"),
            (_not_a_number, "NaN"),
            (Path.unlink, "there is no file"),
        ],
    )
    def test_adapter(
        self, command: Commands, tiny_base: Path, trained: Path, tmp_path: Path, spoil: Spoil, reason: str
    ) -> None:
        path = Path(shutil.copy(trained / "run.safetensors", tmp_path / "a b.safetensors"))
        spoil(path)
        message = self.refused(command, tiny_base, "--adapter", path, "--output", tmp_path / "out")
        assert str(path) in message
        assert reason in message

    def test_run_folder_as_adapter(self, command: Commands, tiny_base: Path, trained: Path, tmp_path: Path) -> None:
        message = self.refused(command, tiny_base, "--adapter", f"{trained}:0.5", "--output", tmp_path / "out")
        assert "is a run folder" in message
        assert str(trained / "run.safetensors") in message

    @pytest.mark.parametrize("weight", ["abc", "", "1e", "nan", "0.5.1"])
    def test_weight(self, command: Commands, tiny_base: Path, trained: Path, tmp_path: Path, weight: str) -> None:
        adapter = f"{trained / 'run.safetensors'}:{weight}"
        message = self.refused(command, tiny_base, "--adapter", adapter, "--output", tmp_path / "out")
        assert "is not a weight" in message
        assert "style.safetensors:0.8" in message

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--steps", "0"], "--steps 0"),
            (["--seed", "-1"], "--seed -1"),
            (["--seed", str(2**64)], "--seed"),
            (["--seed", "x"], "--seed"),
            (["--guidance", "nan"], "--guidance nan"),
            (["--guidance", "0"], "--guidance 0"),
            (["--size", "16"], "WIDTHxHEIGHT"),
            (["--size", "0x16"], "WIDTHxHEIGHT"),
            (["--size", "18x16"], "multiples of 4"),
            (["--config", "x.yaml"], "--config"),
        ],
    )
    def test_numbers(
        self, command: Commands, tiny_base: Path, tmp_path: Path, arguments: list[str], reason: str
    ) -> None:
        assert reason in self.refused(command, tiny_base, "--output", tmp_path / "out", *arguments)

    def test_output_is_a_file(self, command: Commands, tiny_base: Path, images: Path) -> None:
        assert "is a file" in self.refused(command, tiny_base, "--output", images / "0.png")

    def test_no_prompt(self, command: Commands, tiny_base: Path, tmp_path: Path) -> None:
        outcome = command("generate", "--model", tiny_base, "--output", tmp_path / "out")
        assert outcome.code == 2
        assert "--prompt" in outcome.err

    def test_no_base(self, command: Commands, tmp_path: Path) -> None:
        outcome = command("generate", "--prompt", "a cat", "--output", tmp_path / "out")
        assert outcome.code == 2
        config = tmp_path / "config.yaml"
        config.write_text("train:\n  seed: 3\n")
        outcome = command("generate", "--config", config, "--prompt", "a cat", "--output", tmp_path / "out")
        assert outcome.code == 2
        assert "names no base" in outcome.message


class TestExportAndInspect:
    def test_folder_that_is_no_run(self, command: Commands, images: Path, tmp_path: Path) -> None:
        outcome = command("export", images, "--to", "peft", "--output", tmp_path / "x")
        assert outcome.code == 2
        assert "is not a run folder" in outcome.message

    def test_run_without_an_adapter(self, command: Commands, trained: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        run.mkdir()
        shutil.copy(trained / "config.yaml", run)
        outcome = command("export", run, "--to", "peft", "--output", tmp_path / "x")
        assert outcome.code == 2
        assert "no finished adapter" in outcome.message

    def test_existing_file(self, command: Commands, trained: Path, tmp_path: Path) -> None:
        target = tmp_path / "x.safetensors"
        target.write_text("mine")
        outcome = command("export", trained, "--to", "kohya", "--output", target)
        assert outcome.code == 2
        assert target.read_text() == "mine"

    @pytest.mark.parametrize("format_name", ["kohya", "diffusers", "peft"])
    def test_folders_are_never_replaced(self, command: Commands, trained: Path, images: Path, format_name: str) -> None:
        outcome = command("export", trained, "--to", format_name, "--output", images, "--overwrite")
        assert outcome.code == 2
        assert len(list(images.glob("*.png"))) == 4

    def test_inspect_of_what_is_no_adapter(self, command: Commands, images: Path, tmp_path: Path) -> None:
        for path in (images / "0.png", images, tmp_path / "nothing.safetensors"):
            outcome = command("inspect", path)
            assert outcome.code == 2
            assert str(path) in outcome.message


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["train", "dry run"])
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["train.tracker=tensorboard"], "tensorboard"),
        (["train.optimizer=paged_adamw8bit"], "train.optimizer=paged_adamw8bit"),
        (["evaluate.every_steps=5", "evaluate.references=/no/such/folder"], "evaluate.references=/no/such/folder"),
    ],
)
def test_what_is_needed_later(
    training: Training, monkeypatch: pytest.MonkeyPatch, dry: tuple[str, ...], arguments: list[str], fragment: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert fragment in training.refused(*arguments, *dry)
