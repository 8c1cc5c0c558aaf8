"""Stable Diffusion 2.x: as 1.x, with OpenCLIP's text encoder and, at 768 pixels, a UNet that predicts the velocity.

The text encoder of a diffusers folder has 23 of OpenCLIP's 24 layers, so its last layer is the penultimate one, which
the UNet was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.architectures import sd2
from lora_diffusion.families.sd1 import StableDiffusion1
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions


@dataclass(frozen=True)
class SD2Options(StableDiffusionOptions):
    """A Stable Diffusion 2.x base and its training objective."""

    family: str = "sd2"
    """Kind of base model."""


class StableDiffusion2(StableDiffusion1):
    """The family object: the data that differs from Stable Diffusion 1."""

    architecture = sd2.ARCHITECTURE
    options_type = SD2Options


FAMILY = StableDiffusion2()
