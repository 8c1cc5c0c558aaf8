"""What only Stable Diffusion XL has: sizes and crops, two text encoders, pooled embeds, the empty prompt as zeros."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_diffusion.config.schema import ImageDataConfig
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import ImageText
from lora_diffusion.data import image_folder, images
from lora_diffusion.diffusion.noise import Gaussian
from lora_diffusion.diffusion.timesteps import Stratified
from lora_diffusion.families.sdxl import FAMILY, SDXLOptions
from lora_diffusion.families.stable_diffusion import sampling, text_encoding
from tests.tiny import save_tiny_sdxl_pipeline, tiny_sdxl_pipeline

BOTH = frozenset({"text_encoder", "text_encoder_2"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl_pipeline(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.fixture
def loaded(base: Path) -> Loaded:
    return FAMILY.load(SDXLOptions(path=str(base)), torch.device("cpu"))


def sample(**values: Any) -> ImageText:
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = {"captions": ("a cat",), "size": (24, 16), "original_size": (30, 40), "pixels": pixels}
    return ImageText("cat", Path("cat"), **{**settings, **values})


def test_the_unet_is_told_size_and_crop_of_each_view(loaded: Loaded) -> None:
    (item,) = FAMILY.prepare(loaded, [sample(crop=(3, 5, 7, 9))], frozenset())
    # Height before width, top before left (Podell et al. 2023, section 2.2); in the mirror image right is left.
    assert item.tensors["time_ids"].tolist() == [[40, 30, 5, 3, 16, 24], [40, 30, 5, 7, 16, 24]]


@pytest.mark.parametrize(
    ("size", "bucket", "margins"),
    [((16, 16), (16, 16), (0, 0, 0, 0)), ((64, 16), (16, 16), (24, 0, 24, 0)), ((8, 32), (16, 16), (0, 24, 0, 24))],
)
def test_crop_is_that_of_the_pixels(
    tmp_path: Path, size: tuple[int, int], bucket: tuple[int, int], margins: tuple[int, int, int, int]
) -> None:
    """An image whose red grows to the right and green downwards shows where it was cut."""
    width, height = size
    ramp = np.zeros((height, width, 3))
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    path = tmp_path / "ramp.png"
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    assert images.crop_margins(size, bucket) == margins
    shown = (images.load_pixels(path, bucket, flip=False)[0] + 1) / 2
    scale = images.cover_scale(size, bucket)
    for channel, axis, side in ((0, 1, width), (1, 0, height)):
        start, full = margins[0 if axis else 1], side * scale
        first = shown[channel].select(axis, 0).mean().item()
        assert first == pytest.approx((start + 0.5) / full, abs=1.5 / full + 0.01)


def test_samples_know_their_size_and_crop(tmp_path: Path, base: Path) -> None:
    Image.new("RGB", (20, 40)).save(tmp_path / "tall.png")
    (tmp_path / "tall.txt").write_text("a cat")
    config = ImageDataConfig(path=str(tmp_path), buckets=False)
    (found,) = image_folder.read(config, FAMILY.check(SDXLOptions(path=str(base))))
    assert (found.size, found.original_size, found.crop) == ((16, 16), (20, 40), (0, 8, 0, 8))


def test_text_is_both_penultimate_layers_and_the_pooled_embeds_of_the_second(loaded: Loaded) -> None:
    (item,) = FAMILY.prepare(loaded, [sample()], frozenset())
    pipeline = tiny_sdxl_pipeline()
    embeds, _, pooled, _ = pipeline.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=False)
    ours = torch.cat([item.tensors["text"], item.tensors["text_2"]], dim=-1)
    torch.testing.assert_close(ours, embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(item.tensors["summary"], pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", [frozenset(), frozenset({"text_encoder"}), BOTH], ids=["none", "first", "both"])
def test_a_dropped_caption_is_zeros_and_an_empty_one_is_not(loaded: Loaded, trained: frozenset[str]) -> None:
    (item,) = FAMILY.prepare(loaded, [sample(captions=("",))], trained)
    tensors = FAMILY.collate([item]).tensors
    names = [name for name in tensors if f"{name}_empty" in tensors]
    times = {"time_ids": tensors["time_ids"][:, 0]}
    shown = text_encoding.encode_rows(
        loaded, FAMILY.architecture, {name: tensors[name][:, 0] for name in names} | times
    )
    dropped = text_encoding.encode_rows(
        loaded, FAMILY.architecture, {name: tensors[f"{name}_empty"] for name in names} | times
    )
    for name in ("context", "text_embeds"):
        assert dropped[name].abs().max() == 0
        assert shown[name].abs().min(dim=-1).values.max() > 0


def test_a_base_that_reads_the_empty_prompt_is_asked_with_it(tmp_path: Path) -> None:
    pipeline = tiny_sdxl_pipeline()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    loaded = FAMILY.load(SDXLOptions(path=str(tmp_path)), torch.device("cpu"))
    (item,) = FAMILY.prepare(loaded, [sample()], frozenset())
    assert item.tensors["shown_empty"].tolist() == [1.0]


def test_a_vae_that_overflows_stays_in_fp32(base: Path, tmp_path: Path) -> None:
    loaded = FAMILY.load(SDXLOptions(path=str(base), dtype="fp16"), torch.device("cpu"))
    assert (loaded.parts["unet"].dtype, loaded.modules["vae"].dtype) == (torch.float16, torch.float32)
    loaded = FAMILY.load(SDXLOptions(path=str(base), dtype="bf16"), torch.device("cpu"))
    assert loaded.modules["vae"].dtype == torch.bfloat16
    pipeline = tiny_sdxl_pipeline()
    pipeline.vae.register_to_config(force_upcast=False)
    pipeline.save_pretrained(tmp_path)
    loaded = FAMILY.load(SDXLOptions(path=str(tmp_path), dtype="fp16"), torch.device("cpu"))
    assert loaded.modules["vae"].dtype == torch.float16
    config_path = tmp_path / "vae" / "config.json"
    config = json.loads(config_path.read_text())
    del config["force_upcast"]
    config_path.write_text(json.dumps(config))
    loaded = FAMILY.load(SDXLOptions(path=str(tmp_path), dtype="fp16"), torch.device("cpu"))
    assert loaded.modules["vae"].dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_that_of_the_formula(base: Path, prediction: str) -> None:
    """The draws are repeated by hand; noise, velocity and mean are written out in float64."""
    loaded = FAMILY.load(SDXLOptions(path=str(base), prediction=prediction), torch.device("cpu"))
    items = FAMILY.prepare(loaded, [replace(sample(), key=key) for key in "ab"], frozenset())
    batch = FAMILY.collate(items)
    own = step_loss(FAMILY, loaded)(batch, derive(0, "loss")).per_sample

    rng = derive(0, "loss")
    views = sampling.draw_indices(torch.tensor([2, 2]), rng)
    moments = batch.tensors["moments"][torch.arange(2), views]
    mean, logvar = moments.double().chunk(2, dim=1)
    latents = (mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=rng).double()) * 0.13025
    timesteps = Stratified().draw(2, 1000, rng)
    noise = Gaussian().draw(latents.shape, rng).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    target = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    tensors = batch.tensors
    added = {"text_embeds": tensors["summary"][:, 0], "time_ids": tensors["time_ids"][torch.arange(2), views]}
    context = torch.cat([tensors["text"], tensors["text_2"]], dim=-1)[:, 0]
    with torch.no_grad():
        predicted = loaded.parts["unet"](noisy.float(), timesteps, context, added_cond_kwargs=added).sample
    expected = (predicted.double() - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(own.double(), expected, rtol=1e-4, atol=1e-5)
