"""Two steps of training on the tiny base of every family, and with quantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.tiny import save_tiny_pipeline, save_tiny_sd2_pipeline, save_tiny_sdxl_pipeline
from tests.workflows.conftest import Commands

SAVERS = {"sd1": save_tiny_pipeline, "sd2": save_tiny_sd2_pipeline, "sdxl": save_tiny_sdxl_pipeline}
PARTS = {"sd1": "[unet,text_encoder]", "sd2": "[unet,text_encoder]", "sdxl": "[unet,text_encoder,text_encoder_2]"}
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd2", []),
        ("sdxl", ["train.gradient_checkpointing=true", "data.flip=true"]),
        ("sd1", ["model.quantization=8bit"]),
        ("sd1", ["model.quantization=nf4", "train.optimizer=adamw8bit", "train.gradient_checkpointing=true"]),
        ("sd2", ["model.quantization=8bit", "train.gradient_checkpointing=true"]),
        ("sdxl", ["model.quantization=nf4", "adapter.targets=[attn,unet/conv]"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(text.split("=")[1] for text in value) or "plain",
)
def test_trains_and_writes(command: Commands, images: Path, tmp_path: Path, family: str, settings: list[str]) -> None:
    base, run = SAVERS[family](tmp_path / "base"), tmp_path / "run"
    common = [f"model.family={family}", f"model.path={base}", f"data.path={images}", f"output.path={run}"]
    steps = ["train.max_steps=2", "train.batch_size=2", "train.precision=fp32", "adapter.rank=2"]
    command.good(
        "train", *common, *steps, f"adapter.parts={PARTS[family]}", "output.formats=[kohya,diffusers]", *settings
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] > 0 for line in lines] == [True, True]
    with safe_open(run / "run.safetensors", framework="pt") as file:
        assert file.metadata()["ss_base_model_version"] == VERSIONS[family]


def test_previews_work_while_one_text_encoder_of_two_is_trained(
    command: Commands, images: Path, tmp_path: Path
) -> None:
    base, run = save_tiny_sdxl_pipeline(tmp_path / "base"), tmp_path / "run"
    settings = ["adapter.parts=[unet,text_encoder_2]", "train.preview_every_steps=1", "preview.num_steps=1"]
    common = ["model.family=sdxl", f"model.path={base}", f"data.path={images}", f"output.path={run}"]
    command.good("train", *common, *settings, "train.max_steps=2", "adapter.rank=2")
    assert len(list((run / "previews").glob("step-*"))) == 3


def test_wrong_family_is_one_line_that_names_the_right_one(command: Commands, images: Path, tmp_path: Path) -> None:
    base = save_tiny_sdxl_pipeline(tmp_path / "base")
    outcome = command("train", f"model.path={base}", f"data.path={images}", f"output.path={tmp_path / 'run'}")
    assert outcome.code == 2
    assert "is Stable Diffusion XL, not Stable Diffusion 1.x; set model.family=sdxl" in outcome.message
