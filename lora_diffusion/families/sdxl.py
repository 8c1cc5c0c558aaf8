"""Stable Diffusion XL: two text encoders, pooled embeds, and a UNet that is told sizes and crops."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.architectures import sdxl
from lora_diffusion.families.stable_diffusion.family import StableDiffusion
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions


@dataclass(frozen=True)
class SDXLOptions(StableDiffusionOptions):
    """A Stable Diffusion XL base and its training objective."""

    family: str = "sdxl"
    """Family of the base."""


FAMILY = StableDiffusion(sdxl.ARCHITECTURE, SDXLOptions)
