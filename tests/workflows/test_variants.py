"""Every variant from `train` to an image; what cannot work is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.workflows.conftest import Commands


def _settings(tiny_base: Path, images: Path, output: Path, variant: str, format_name: str) -> list[str]:
    return [
        *(f"model.path={tiny_base}", f"data.path={images}", f"output.path={output}"),
        *(f"adapter.variant={variant}", "adapter.parts=[unet, text_encoder]", "adapter.rank=3", "adapter.alpha=2"),
        *(f"output.formats=[{format_name}]", "output.dtype=fp32", "output.name=mine"),
        *("train.max_steps=4", "train.batch_size=2", "train.learning_rate=1e-1", "train.precision=fp32"),
        *("train.text_encoder_learning_rate=1e-1", "train.threads=1", "train.save_every_steps=2"),
    ]


def _pixels(command: Commands, base: Path, output: Path, *adapters: str) -> np.ndarray:
    options = [part for adapter in adapters for part in ("--adapter", adapter)]
    command.good(
        *("generate", "--model", base, "--prompt", "a red cat, sks style", "--steps", 2, "--output", output, *options)
    )
    (path,) = [path for path in output.glob("*.png") if path.name != "grid.png"]
    return np.asarray(Image.open(path), dtype=np.int64)


@pytest.mark.parametrize(
    ("variant", "format_name"),
    [("locon", "kohya"), ("dora", "kohya"), ("dora_out", "diffusers"), ("loha", "kohya"), ("lokr", "peft")],
)
def test_trained_file_draws(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path, variant: str, format_name: str
) -> None:
    settings = _settings(tiny_base, images, tmp_path / "run", variant, format_name)
    command.good("train", *settings)
    (file,) = (path for path in (tmp_path / "run").glob("mine*"))
    result = json.loads(command.good("inspect", file, "--json").out)
    assert (result["format"], result["variant"]) == (
        format_name,
        {"locon": "lora", "dora_out": "dora"}.get(variant, variant),
    )
    base = _pixels(command, tiny_base, tmp_path / "base")
    adapted = _pixels(command, tiny_base, tmp_path / "adapted", f"{file}")
    assert np.abs(adapted - base).max() > 2
    assert np.array_equal(_pixels(command, tiny_base, tmp_path / "off", f"{file}:0"), base)


def test_resumed_run_of_dora_equals_the_uninterrupted_one(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path
) -> None:
    whole = _settings(tiny_base, images, tmp_path / "whole", "dora", "kohya")
    parts = _settings(tiny_base, images, tmp_path / "parts", "dora", "kohya")
    constant = "train.schedule=constant"
    command.good("train", *whole, constant)
    command.good("train", *parts, constant, "train.max_steps=2")
    command.good("train", *parts, constant, "--resume")
    first, second = (tmp_path / name / "checkpoints" / "step-000004" for name in ("whole", "parts"))
    files = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert files
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("output.formats=[peft]", "The peft format cannot hold dora adapters"),
        ("adapter.variant=loha model.quantization=nf4", "adapter.variant=loha cannot train on a nf4 base"),
        ("adapter.variant=lokr adapter.dropout=0.1", "does not work with adapter.variant=lokr"),
        ("adapter.variant=dorra", "write dora"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_cannot_work_is_refused(
    command: Commands, tiny_base: Path, images: Path, tmp_path: Path, change: str, text: str, dry_run: bool
) -> None:
    settings = _settings(tiny_base, images, tmp_path / "run", "dora", "kohya")
    outcome = command("train", *settings, *change.split(" "), *(["--dry-run"] if dry_run else []))
    assert outcome.code == 2
    assert text in outcome.message
    assert not (tmp_path / "run").exists()
