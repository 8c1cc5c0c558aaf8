"""What a run spends beside its training steps: each image is encoded once, and nothing is drawn that is not used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lora_diffusion.runtime.device import without_compiler
from tests.workflows.conftest import Commands

Train = Callable[..., Path]


@pytest.fixture
def train(command: Commands, tiny_base: Path, images: Path, tmp_path: Path) -> Train:
    def run(name: str, *arguments: str) -> Path:
        settings = [f"model.path={tiny_base}", f"data.path={images}", f"cache.path={tmp_path / 'cache'}"]
        settings += ["adapter.rank=2", "train.max_steps=1", "train.precision=fp32", "train.threads=1"]
        run.said = command.good(
            "train", *settings, f"output.path={tmp_path / name}", "output.name=a", *arguments
        ).message  # type: ignore[attr-defined]
        return tmp_path / name

    return run


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of views that went through the VAE, call by call."""
    counts: list[int] = []
    encode = AutoencoderKL.encode

    def counted(self: AutoencoderKL, pixels: torch.Tensor, *args: object, **kwargs: object) -> object:
        counts.append(len(pixels))
        return encode(self, pixels, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "encode", counted)
    yield counts


def test_each_image_is_encoded_once(train: Train, images: Path, encoded: list[int]) -> None:
    run = train("first", "evaluate.picture_draws=2", "model.prior_weight=0.3")
    assert sum(encoded) == 4
    assert len(json.loads((run / "picture_losses.json").read_text())) == 4
    (images / "1.txt").write_text("another dog of sks style\n")
    train("captions", "evaluate.picture_draws=2", "model.prior_weight=0.3")
    train("parts", "adapter.parts=[unet,text_encoder]", "evaluate.picture_draws=1")
    assert sum(encoded) == 4
    (images / "1.png").write_bytes((images / "2.png").read_bytes())
    train("replaced", "evaluate.picture_draws=1")
    assert sum(encoded) == 4, "the same image under another name"
    train("mirrored", "data.flip=true")
    assert encoded[4:] == [2, 2, 2]


def test_losses_of_images_are_the_same_from_a_warm_cache(train: Train) -> None:
    first, second = (train(name, "evaluate.picture_draws=3", "model.prior_weight=0.3") for name in ("one", "two"))
    assert (first / "picture_losses.json").read_text() == (second / "picture_losses.json").read_text()


def test_short_runs_measure_images_only_where_it_is_asked_for(train: Train) -> None:
    assert not (train("short") / "picture_losses.json").exists()
    assert "evaluate.picture_draws=8 asks for them" in train.said  # type: ignore[attr-defined]


def test_long_runs_measure_within_3_percent_of_their_passes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    forward = UNet2DConditionModel.forward

    def counted(self: UNet2DConditionModel, *args: object, **kwargs: object) -> object:
        passes.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    run = train("long", "train.max_steps=140", "train.batch_size=2")
    assert len(json.loads((run / "picture_losses.json").read_text())) == 2
    assert (passes.count(True), passes.count(False)) == (140, 4)


def test_a_run_too_short_for_previews_or_scores_draws_nothing(
    train: Train, tiny_base: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *_: pytest.fail("an image was generated"))
    scored = [f"evaluate.references={images}", "evaluate.clip=builtin:emoji-clip"]
    run = train("run", "train.preview_every_steps=2", "evaluate.every_steps=2", *scored)
    assert not (run / "previews").exists()
    assert "No preview is made in 1 steps" in train.said  # type: ignore[attr-defined]


def test_flipped_bits_of_the_cache_are_never_trained_on(train: Train, tmp_path: Path, encoded: list[int]) -> None:
    whole = load_file(train("whole") / "a.safetensors")
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    for file in files:
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x42
        file.write_bytes(content)
    again = load_file(train("again") / "a.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert train.said.count("damaged") == 1 and f"{len(files)} cache file(s)" in train.said  # type: ignore[attr-defined]
    assert sum(encoded) == 8


def test_content_of_another_sample_under_a_right_name_is_noticed(train: Train, tmp_path: Path) -> None:
    whole = load_file(train("whole") / "a.safetensors")
    files = [file for file in sorted((tmp_path / "cache").rglob("*.safetensors")) if "moments" in load_file(file)]
    others = [load_file(file) for file in [*files[1:], files[0]]]
    for file, other in zip(files, others, strict=True):
        save_file(other, file, {"content": file.stem})
    again = load_file(train("again") / "a.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_compiler_is_left_out_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    with without_compiler():
        assert torch.compile(double) is double
    assert torch.compile(double) is not double
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    with without_compiler():
        assert torch.compile(double) is not double
