"""How much images look like the references."""

from __future__ import annotations

from lora_diffusion.scoring.metrics._shared import MeanLikeness


class ClipImage(MeanLikeness):
    """Mean cosine of each image with all references (CLIP-I of Ruiz et al. 2023, arXiv 2208.12242, section 4.2)."""

    name = "clip_image"
    meaning = "how much the image looks like the references: mean cosine in CLIP space"


METRIC = ClipImage()
