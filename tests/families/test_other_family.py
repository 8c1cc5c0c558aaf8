"""A family that another package brings: a description of its base, options, and no other code."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.protocols.family import step_loss
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import ImageText, Request
from lora_diffusion.families.stable_diffusion.family import StableDiffusion
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions
from tests.families.ldm import save_single_file, shaped_pipeline
from tests.tiny import save_tiny_sd2_pipeline


@dataclass(frozen=True)
class OtherOptions(StableDiffusionOptions):
    """A base of the other family."""

    family: str = "other"
    """Family of the base."""


OTHER = replace(
    DIFFUSION["sd1"],
    name="other",
    title="Other Diffusion",
    modelspec=dict.fromkeys(("epsilon", "v_prediction"), "other-diffusion"),
)
FAMILY = StableDiffusion(OTHER, OtherOptions)


def test_it_trains_and_generates(tiny_base: Path) -> None:
    options = OtherOptions(path=str(tiny_base))
    assert FAMILY.check(options).architecture == "other-diffusion"
    assert FAMILY.meta_modules(options).keys() == FAMILY.parts.keys() == {"unet", "text_encoder"}
    loaded = FAMILY.load(options, torch.device("cpu"))
    sample = ImageText("a", tiny_base, captions=("a cat",), size=(16, 16), pixels=torch.rand(1, 3, 16, 16) * 2 - 1)
    batch = FAMILY.collate(FAMILY.prepare(loaded, [sample], frozenset()))
    assert step_loss(FAMILY, loaded)(batch, derive(0, "loss")).per_sample.isfinite().all()
    (output,) = FAMILY.generate(loaded, [Request("a cat", 0, num_steps=2, size=(16, 16))])
    assert output.image.size == (16, 16)


def test_its_modules_have_the_names_of_files() -> None:
    names = FAMILY.key_map("kohya", None)
    assert "lora_unet_mid_block_attentions_0_proj_in" in names


def test_its_checkpoints_are_its_own_and_those_of_others_are_named(tmp_path: Path) -> None:
    file = save_single_file(shaped_pipeline("sd1"), tmp_path / "base.safetensors")
    assert FAMILY.meta_modules(OtherOptions(path=str(file))).keys() == FAMILY.parts.keys()
    save_tiny_sd2_pipeline(tmp_path / "sd2")
    with pytest.raises(ModelError, match=r"is Stable Diffusion 2\.x, not Other Diffusion; set model\.family=sd2"):
        FAMILY.check(OtherOptions(path=str(tmp_path / "sd2")))
