"""Stable Diffusion 1.x: one CLIP text encoder, a UNet on VAE latents."""

from __future__ import annotations

from dataclasses import dataclass

from lora_diffusion.architectures import sd1
from lora_diffusion.families.stable_diffusion.family import StableDiffusion
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions


@dataclass(frozen=True)
class SD1Options(StableDiffusionOptions):
    """A Stable Diffusion 1.x base and its training objective."""

    family: str = "sd1"
    """Family of the base."""


FAMILY = StableDiffusion(sd1.ARCHITECTURE, SD1Options)
