"""Our images and text against the pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.samples import Request
from tests.tiny import tiny_pipeline, tiny_sd2_pipeline, tiny_sdxl_pipeline

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2_pipeline,
    "sdxl": tiny_sdxl_pipeline,
}
PROMPTS, SEEDS = ["a red cat", "a dog of the sks style"], (1, 2)
# Half a step of the 8 bits of an image, and what sums in another order may differ by.
TOLERANCE = 0.5 / 255 + 1e-3


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(family) / "base"
    PIPELINES[family]().save_pretrained(path)
    return path


def load(family: str, folder: Path, **options: Any) -> Loaded:
    found = registry.find("families", family)
    return found.load(found.options_type(path=str(folder), **options), torch.device("cpu"))


def drawn(family: str, loaded: Loaded, **settings: Any) -> np.ndarray:
    requests = [Request(prompt, seed, num_steps=3, **settings) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    outputs = registry.find("families", family).generate(loaded, requests)
    return np.stack([np.asarray(output.image) / 255 for output in outputs])


def expected(pipeline: Any, **settings: Any) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    size = {"height": 16, "width": 16} | settings
    return pipeline(PROMPTS, num_inference_steps=3, generator=generators, output_type="np", **size).images


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"guidance_scale": 3.0}),
        ({"negative": "blue", "guidance": 5.0}, {"negative_prompt": ["blue"] * 2, "guidance_scale": 5.0}),
        ({"guidance": 1.0, "size": (24, 16)}, {"guidance_scale": 1.0, "width": 24}),
    ],
    ids=["plain", "negative", "unguided"],
)
def test_images_are_those_of_diffusers(family: str, folder: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    images = drawn(family, load(family, folder), **ours)
    assert np.abs(images - expected(PIPELINES[family](), **theirs)).max() < TOLERANCE


@pytest.mark.parametrize("one_encoder", ["sd1", "sd2"])
def test_clip_skip_counts_one_more_than_diffusers(one_encoder: str, tmp_path: Path) -> None:
    pipeline = PIPELINES[one_encoder]()
    pipeline.save_pretrained(tmp_path)
    # The pipeline looks for the last norm where the encoder had it before transformers 5.6.
    norm = SimpleNamespace(final_layer_norm=pipeline.text_encoder.final_layer_norm)
    object.__setattr__(pipeline.text_encoder, "text_model", norm)
    images = drawn(one_encoder, load(one_encoder, tmp_path, clip_skip=2), guidance=1.0)
    assert np.abs(images - expected(pipeline, clip_skip=1, guidance_scale=1.0)).max() < TOLERANCE
    assert np.abs(images - drawn(one_encoder, load(one_encoder, tmp_path), guidance=1.0)).max() > 1 / 255


def test_clip_skip_of_sdxl_starts_at_the_last_layer_but_one(tmp_path: Path) -> None:
    tiny_sdxl_pipeline().save_pretrained(tmp_path)
    usual, same, last = (load("sdxl", tmp_path, clip_skip=skip) for skip in (None, 2, 1))
    assert np.array_equal(drawn("sdxl", usual), drawn("sdxl", same))
    assert not np.array_equal(drawn("sdxl", usual), drawn("sdxl", last))


def test_clip_skip_beyond_the_text_encoder_is_refused(family: str, folder: Path) -> None:
    found = registry.find("families", family)
    with pytest.raises(ModelError, match="give a number from 1 to 2"):
        found.check(found.options_type(path=str(folder), clip_skip=3))


@pytest.mark.parametrize("other", ["sd1", "sd2", "sdxl"])
def test_wrong_family_names_the_right_one(family: str, folder: Path, other: str) -> None:
    found = registry.find("families", other)
    if other == family:
        assert found.check(found.options_type(path=str(folder))).source == str(folder)
        return
    with pytest.raises(ModelError, match=rf"set model\.family={family}, or"):
        found.check(found.options_type(path=str(folder)))


class TestZeroTerminalSnr:
    def test_noise_and_sampler_are_those_of_diffusers(self, family: str, folder: Path) -> None:
        loaded = load(family, folder, prediction="v_prediction", zero_terminal_snr="always")
        config = PIPELINES[family]().scheduler.config
        reference = DDIMScheduler.from_config(config, rescale_betas_zero_snr=True)
        own = loaded.modules["schedule"].alphas_cumprod
        torch.testing.assert_close(own, reference.alphas_cumprod, rtol=1e-5, atol=1e-6)
        assert own[-1] == 0
        assert loaded.modules["scheduler"].config.rescale_betas_zero_snr
        assert loaded.modules["scheduler"].config.timestep_spacing == "trailing"
        assert np.isfinite(drawn(family, loaded)).all()

    def test_is_read_off_the_base_and_can_be_overridden(self, family: str, tmp_path: Path) -> None:
        pipeline = PIPELINES[family]()
        scheduler = type(pipeline.scheduler)
        changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
        pipeline.register_modules(scheduler=scheduler.from_config(pipeline.scheduler.config, **changes))
        pipeline.save_pretrained(tmp_path)
        assert load(family, tmp_path).info.zero_terminal_snr
        assert load(family, tmp_path).info.prediction == "v_prediction"
        never = load(family, tmp_path, zero_terminal_snr="never")
        assert never.modules["schedule"].alphas_cumprod[-1] > 1e-3
        assert not never.modules["scheduler"].config.rescale_betas_zero_snr

    def test_cannot_be_had_with_epsilon(self, family: str, folder: Path) -> None:
        found = registry.find("families", family)
        with pytest.raises(ModelError, match=r"set model\.prediction=v_prediction or"):
            found.check(found.options_type(path=str(folder), prediction="epsilon", zero_terminal_snr="always"))
