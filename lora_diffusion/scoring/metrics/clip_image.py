"""How much pictures look like the references."""

from __future__ import annotations

from lora_diffusion.scoring.metrics._likeness import MeanLikeness


class ClipImage(MeanLikeness):
    """Mean cosine of each picture with all references (CLIP-I of Ruiz et al. 2023, arXiv 2208.12242, section 4.2)."""

    name = "clip_image"
    meaning = "how much the picture looks like the references: mean cosine in CLIP space"


METRIC = ClipImage()
