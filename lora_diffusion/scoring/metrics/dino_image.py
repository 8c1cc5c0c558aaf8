"""How much images look like the references, seen by a network that was trained without texts."""

from __future__ import annotations

from lora_diffusion.scoring.metrics._shared import MeanLikeness


class DinoImage(MeanLikeness):
    """Mean cosine of class tokens (DINO of Ruiz et al. 2023, arXiv 2208.12242, section 4.2, with any DINOv2)."""

    name = "dino_image"
    meaning = "how much the image looks like the references: mean cosine in DINO space"
    scorers = ("dino",)


METRIC = DinoImage()
