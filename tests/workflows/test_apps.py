"""Files of a run in the programs they are made for: same images in diffusers, same outputs in PEFT."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from tests.workflows.conftest import Commands

PROMPT, NEGATIVE, SEED, NUM_STEPS, GUIDANCE = "a red cat, sks style", "blue", 11, 4, 4.0
TOLERANCE = 1e-3
"""Largest difference over pixel values in 0..1 at float32: sums are taken in another order."""
ROUNDING = 0.5 / 255
"""Ours are read from 8-bit files."""


@pytest.fixture(params=["trained", "trained_unevenly"])
def run(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def _pipeline(base: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _theirs(pipeline: StableDiffusionPipeline, scale: float | None = None) -> np.ndarray:
    return pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="np",
        cross_attention_kwargs=None if scale is None else {"scale": scale},
    ).images[0]


def _ours(command: Commands, base: Path, output: Path, *adapters: str) -> np.ndarray:
    arguments = [part for adapter in adapters for part in ("--adapter", adapter)]
    command.good(
        *("generate", "--model", base, "--prompt", PROMPT, "--negative", NEGATIVE, "--seed", SEED),
        *("--steps", NUM_STEPS, "--guidance", GUIDANCE, "--output", output, *arguments),
    )
    (path,) = [path for path in output.glob("*.png") if path.name != "grid.png"]
    return np.asarray(Image.open(path), dtype=np.float64) / 255


def test_base_alone(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    assert np.abs(_ours(command, tiny_base, tmp_path) - _theirs(_pipeline(tiny_base))).max() < TOLERANCE + ROUNDING


@pytest.mark.parametrize("name", ["run.safetensors", "run.diffusers.safetensors"])
def test_diffusers_draws_the_same_image(
    command: Commands,
    tiny_base: Path,
    run: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(diffusers_logging._get_library_root_logger(), "propagate", True)
    pipeline = _pipeline(tiny_base)
    base = _theirs(pipeline)
    with caplog.at_level(logging.WARNING):
        pipeline.load_lora_weights(run, weight_name=name, adapter_name="ours")
    assert not [record.getMessage() for record in caplog.records if "key" in record.getMessage().lower()]

    layers = [
        module
        for network in (pipeline.unet, pipeline.text_encoder)
        for module in network.modules()
        if "ours" in getattr(module, "lora_A", {})
    ]
    num_pairs = sum(key.endswith(("lora_up.weight", "lora_B.weight")) for key in load_file(run / name))
    assert len(layers) == num_pairs

    full = _ours(command, tiny_base, tmp_path / "1", f"{run / name}")
    assert np.abs(full - base).max() > 0.02
    assert np.abs(full - _theirs(pipeline)).max() < TOLERANCE + ROUNDING

    part = _ours(command, tiny_base, tmp_path / "0.8", f"{run / name}:0.8")
    assert np.abs(part - full).max() > 4 * ROUNDING
    assert np.abs(part - _theirs(pipeline, scale=0.8)).max() < TOLERANCE + ROUNDING
    pipeline.set_adapters(["ours"], [0.8])
    assert np.abs(part - _theirs(pipeline)).max() < TOLERANCE + ROUNDING


def test_peft_folder_gives_the_same_outputs(tiny_base: Path, run: Path) -> None:
    """The networks with PEFT's adapters equal those with the kohya file in diffusers."""
    by_diffusers, by_peft = _pipeline(tiny_base), _pipeline(tiny_base)
    by_diffusers.load_lora_weights(run, weight_name="run.safetensors")
    ids = torch.arange(16)[None]
    latents, timestep = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        plain = by_peft.text_encoder(ids)[0].clone()
        text_encoder = PeftModel.from_pretrained(by_peft.text_encoder, run / "run.peft" / "text_encoder")
        unet = PeftModel.from_pretrained(by_peft.unet, run / "run.peft" / "unet")
        expected = by_diffusers.text_encoder(ids)[0]
        torch.testing.assert_close(text_encoder(ids)[0], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(plain, expected, atol=1e-3)
        torch.testing.assert_close(
            unet(latents, timestep, encoder_hidden_states=expected).sample,
            by_diffusers.unet(latents, timestep, encoder_hidden_states=expected).sample,
            rtol=1e-5,
            atol=1e-5,
        )
