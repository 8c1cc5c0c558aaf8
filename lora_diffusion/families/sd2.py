"""Stable Diffusion 2.x: as 1.x, with OpenCLIP's text encoder."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.architectures import sd2
from lora_diffusion.families.stable_diffusion.family import StableDiffusion
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions


@dataclass(frozen=True)
class SD2Options(StableDiffusionOptions):
    """A Stable Diffusion 2.x base and its training objective."""

    family: str = "sd2"
    """Family of the base."""


FAMILY = StableDiffusion(sd2.ARCHITECTURE, SD2Options)
