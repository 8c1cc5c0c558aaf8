"""The model card, and what `push` uploads; nothing here reaches a network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from huggingface_hub.errors import OfflineModeIsEnabled
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_diffusion.core.errors import AdapterFileError, ConfigError, RunError
from lora_diffusion.tensorfile.safetensors_file import read_header, rewrite
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import model_card, push
from tests.workflows.conftest import Commands


class FakeHub:
    """Keeps what it is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.repos, self.files = error, [], {}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.repos.append((repo_id, options))

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> SimpleNamespace:
        self.files = {operation.path_in_repo: operation.path_or_fileobj for operation in operations}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def _head(card: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return loaded


def _with_metadata(trained: Path, metadata: dict[str, str], path: Path) -> None:
    """Writes the adapter of a run with other metadata."""
    adapter = trained / "run.safetensors"
    rewrite(adapter, read_header(adapter), metadata, path)


def test_dry_run_of_a_run(command: Commands, trained: Path) -> None:
    result = json.loads(command.good("push", trained, "--repo", "maria/blorp", "--dry-run", "--json").out)
    assert result["url"] is None
    assert {"run.safetensors", "run.diffusers.safetensors", "README.md"} <= result["files"].keys()
    assert "run.peft/unet/adapter_model.safetensors" in result["files"]
    assert not any("config.yaml" in name or ".lock" in name for name in result["files"])
    card = result["card"]
    assert _head(card)["instance_prompt"] == "sks style"
    assert "<lora:run:1> sks style" in card
    assert 'load_lora_weights("maria/blorp", weight_name="run.diffusers.safetensors")' in card
    for words in (
        "ComfyUI/models/loras",
        "**Forge**",
        "--network_module networks.lora",
        "| steps | 8 |",
        "| rank | 4 |",
    ):
        assert words in card
    assert "To maria/blorp would go:" in command.good("push", trained, "--repo", "maria/blorp", "--dry-run").out


def test_push_uploads_files_images_and_card(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in trained.iterdir():
        if path.name not in ("before-after.png",):
            (run / path.name).symlink_to(path)
    Image.new("RGB", (8, 8)).save(run / "before-after.png")
    hub = FakeHub()
    done = push.push(run, "maria/blorp", private=True, hub=hub)
    assert done.url == "https://hub/maria/blorp/commit/1"
    assert hub.repos == [("maria/blorp", {"private": True, "exist_ok": True})]
    assert hub.files["README.md"].decode() == done.card
    assert hub.files["run.safetensors"] == str(run / "run.safetensors")
    assert "![before-after.png](<before-after.png>)" in done.card
    assert _head(done.card)["widget"] == [{"text": "sks style", "output": {"url": "before-after.png"}}]
    assert "Uploaded to https://hub/maria/blorp/commit/1" in done.text()


def test_texts_of_strangers_are_harmless(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    texts = {
        "modelspec.title": "<script>x</script>",
        "modelspec.trigger_phrase": '"`\n```\nx: [',
        "modelspec.license": "MIT",
    }
    rewrite(
        trained / "run.safetensors",
        read_header(trained / "run.safetensors"),
        {**texts, "ss_sd_model_name": "org/base"},
        path,
    )
    card = push.push(path, "maria/blorp", dry_run=True).card
    assert "<script>" not in card
    head = _head(card)
    assert (head["license"], head["base_model"], head["instance_prompt"]) == ("mit", "org/base", '"`\n```\nx: [')
    assert card.split("---\n", 2)[2].count("`" * 3) == 2


@pytest.mark.parametrize("repo", ["blorp", "a/b/c", "maria/../x", "maria/blo rp", ""])
def test_names_that_no_repository_has(repo: str, trained: Path) -> None:
    with pytest.raises(ConfigError, match="--repo"):
        push.push(trained, repo, hub=FakeHub())


def test_hub_that_refuses_and_runs_that_are_not_finished(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"was not uploaded: no network.*hf auth login"):
        push.push(trained, "maria/blorp", hub=FakeHub(OfflineModeIsEnabled("no network")))
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="has no finished adapter"):
        push.push(tmp_path, "maria/blorp", hub=FakeHub())


def test_card_beside_an_export(command: Commands, trained: Path, tmp_path: Path) -> None:
    arguments = ("export", trained, "--to", "kohya", "--output", tmp_path / "a.safetensors", "--card")
    command.good(*arguments)
    card = (tmp_path / "README.md").read_text()
    assert "<lora:a:1>" in card
    (tmp_path / "a.safetensors").unlink()
    outcome = command(*arguments)
    assert (outcome.code, "README.md exists" in outcome.message) == (2, True)
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(
    ("base", "code", "told"),
    [
        ("maria/base", 'AutoPipelineForText2Image.from_pretrained("maria/base",', "maria/base"),
        ("builtin:emoji", 'AutoPipelineForText2Image.from_pretrained(builtin_path("emoji-sd"),', None),
        ("my.safetensors", 'StableDiffusionPipeline.from_single_file("my.safetensors",', None),
        ("bases/own", 'AutoPipelineForText2Image.from_pretrained("bases/own",', None),
    ],
)
def test_code_loads_the_base(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, code: str, told: str | None
) -> None:
    (tmp_path / "bases" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = model_card.write(replace(model_card.collect(trained.resolve()), base=base), "maria/blorp")
    assert code in card
    assert _head(card).get("base_model") == told
    assert ("import builtin_path" in card) == base.startswith("builtin:")


SKIPS = [
    ("stable-diffusion-v1", "2", ("clip_skip=1)", 'Last Layer" to -2.', "--clip_skip 2`"), 2, 0),
    ("stable-diffusion-v2-512", "2", ("clip_skip=1)", 'Last Layer" to -3.', "a.safetensors` to `gen_img"), 1, 1),
    ("stable-diffusion-xl-v1-base", "1", ("clip_skip=-1)", 'Last Layer" to -1.', "--clip_skip 1`"), 0, 2),
    ("stable-diffusion-xl-v1-base", "3", ("clip_skip=1)", 'Last Layer" to -3.', "--clip_skip 3`"), 1, 1),
]


def _card(trained: Path, base: str = "maria/base", **metadata: str) -> str:
    package = model_card.collect(trained.resolve())
    result = {key.replace("__", "."): value for key, value in metadata.items()}
    known = {key: text for key, text in package.metadata.items() if key != "ss_base_model_version"}
    adapters = {"kohya": "a.safetensors", "diffusers": "b.safetensors"}
    return model_card.write(replace(package, base=base, metadata={**known, **result}, adapters=adapters), "maria/blorp")


@pytest.mark.parametrize(("architecture", "skip", "words", "num_told", "num_unable"), SKIPS)
def test_card_tells_each_program_the_layer_of_the_text_encoder(
    trained: Path, architecture: str, skip: str, words: tuple[str, ...], num_told: int, num_unable: int
) -> None:
    card = _card(trained, modelspec__architecture=f"{architecture}/lora", ss_clip_skip=skip)
    assert f"trained with **clip skip {skip}**" in card
    assert f"| clip skip | {skip} |" in card
    assert [word for word in words if word not in card] == []
    assert card.count(f'Set "Clip skip" to {skip}.') == num_told
    assert card.count("reads another layer") == num_unable


@pytest.mark.parametrize(
    ("architecture", "skip"),
    [("stable-diffusion-v1", "1"), ("stable-diffusion-v1", "None"), ("stable-diffusion-xl-v1-base", "2")],
)
def test_card_is_silent_about_the_usual_layer(trained: Path, architecture: str, skip: str) -> None:
    card = _card(trained, modelspec__architecture=f"{architecture}/lora", ss_clip_skip=skip)
    assert "clip skip" not in card.replace(f"| clip skip | {skip} |", "")
    assert "clip_skip" not in card
    assert ("| clip skip |" in card) == (skip != "None")


def test_card_of_a_stranger_does_not_believe_in_a_clip_skip_of_sdxl(trained: Path) -> None:
    package = model_card.collect(trained.resolve())
    result = {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora", "ss_clip_skip": "1"}
    card = model_card.write(replace(package, metadata=result, is_of_run=False), "maria/blorp")
    assert "clip_skip" not in card


@pytest.mark.parametrize(
    ("architecture", "prediction", "base", "scheduler", "is_told"),
    [
        ("stable-diffusion-v1", "epsilon", "a.safetensors", None, False),
        ("stable-diffusion-v1", "v", "maria/base", None, True),
        ("stable-diffusion-xl-v1-base", "v", "a.safetensors", "v_prediction", True),
        ("stable-diffusion-v2-768-v", "v", "a.safetensors", "v_prediction", False),
        ("stable-diffusion-v2-512", "epsilon", "a.safetensors", "epsilon", False),
    ],
)
def test_card_tells_the_prediction_where_programs_would_guess(
    trained: Path, architecture: str, prediction: str, base: str, scheduler: str | None, is_told: bool
) -> None:
    result = {"modelspec__prediction_type": prediction, "modelspec__predict_key": prediction}
    zero = {"ss_zero_terminal_snr": str(prediction == "v")}
    card = _card(trained, base, modelspec__architecture=f"{architecture}/lora", **result, **zero)
    assert ("(**v-prediction**)" in card) == ("ModelSamplingDiscrete" in card) == is_told
    (line,) = re.findall(r"pipeline.scheduler = (.*)", card) or [None]
    assert (line is not None) == (scheduler is not None)
    if line:
        pipeline = SimpleNamespace(scheduler=PNDMScheduler())
        actual = eval(line, {"EulerDiscreteScheduler": EulerDiscreteScheduler, "pipeline": pipeline})
        assert actual.config.prediction_type == scheduler
        assert actual.config.rescale_betas_zero_snr == (prediction == "v")
        assert "import EulerDiscreteScheduler, Stable" in card


def test_stranger_is_no_work_of_ours_and_broken_files_stay_here(trained: Path, tmp_path: Path) -> None:
    assert "trained with lora-diffusion" in push.push(trained, "maria/blorp", dry_run=True).card
    path = tmp_path / "a.safetensors"
    tensors = load_file(trained / "run.safetensors")
    save_file(tensors, path)
    card = push.push(path, "maria/blorp", dry_run=True).card
    assert "lora-diffusion" not in card
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    broken = {
        "NaN": {**tensors, name: tensors[name] * torch.nan},
        "no up": {other: tensor for other, tensor in tensors.items() if other != name},
        "do not fit": {**tensors, name: tensors[name][:, :1].contiguous()},
    }
    for reason, each in broken.items():
        save_file(each, path)
        with pytest.raises(AdapterFileError, match=rf"is broken.*(.|\n)*{reason}"):
            push.push(path, "maria/blorp", dry_run=True)


HOSTILE = "x](http://evil.example/) ![](http://evil.example/p.png) `code` *b* <img src=x>\n# head\n| a | b |\x1b[2J"


@pytest.mark.parametrize("key", ["ss_sd_model_name", "modelspec.title", "modelspec.description", "ss_optimizer"])
def test_texts_of_strangers_are_no_markdown(trained: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    rewrite(
        trained / "run.safetensors",
        read_header(trained / "run.safetensors"),
        {"modelspec.title": "a", key: HOSTILE},
        path,
    )
    card = push.push(path, "maria/blorp", dry_run=True).card
    body = re.sub(r"```.*?```", "", card.split("---\n", 2)[2], flags=re.DOTALL)
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)!\[|://evil|<img|\x1b", body)
    assert "\n# head" not in card
    assert "base_model" not in _head(card)


@pytest.mark.parametrize(
    "name", ["builtin:nothing", "a/b" * 3000, "\0/x", r"C:\\Users\\maria\\sd.safetensors", "/home/maria"]
)
def test_names_of_bases_that_are_none(trained: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    _with_metadata(trained, {"ss_sd_model_name": name}, path)
    assert "maria/" not in push.push(path, "me/x", dry_run=True).card
    assert "maria\\" not in push.push(path, "me/x", dry_run=True).card


def test_nothing_that_is_published_tells_where_files_lie(
    command: Commands, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the card nor the files nor the page, each of which knows paths of base, images and run."""
    root = str(trained.parent)
    base = str(RunFolder(trained).config().model.path)
    secrets = [root, str(Path(base).parent), "/home", str(Path.home())]
    texts = [push.push(trained, "me/x", dry_run=True).card]
    command.good("export", trained, "--to", "kohya", "--output", tmp_path / "a.safetensors", "--card")
    texts.append((tmp_path / "README.md").read_text())
    command.good("report", trained, "--output", tmp_path / "page.html")
    texts += [re.sub(r"base64,[^\"\)]*", "", path.read_text()) for path in tmp_path.glob("page.*")]
    command.good("merge", "--model", base, "--adapter", tmp_path / "a.safetensors", "--output", tmp_path / "merged")
    for path in [*trained.rglob("*.safetensors"), *tmp_path.rglob("*.safetensors"), *trained.glob("*.peft/*/*.json")]:
        texts.append(path.read_bytes().split(b"\0\0\0\0", 1)[0].decode("utf-8", "replace"))
    assert [secret for secret in secrets for text in texts if secret in text] == []
    assert Path(base).name in texts[0]
