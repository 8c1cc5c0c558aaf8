"""How much pictures look like the references."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from lora_diffusion.evaluation.clip import Clip


class ClipImage:
    """Mean cosine of each picture with all references (CLIP-I of Ruiz et al. 2023, arXiv 2208.12242, section 4.2)."""

    name = "clip_image"

    def score(self, clip: Clip, images: Sequence[Image], prompts: Sequence[str], references: Sequence[Image]) -> Tensor:
        """Returns [num_images] in -1..1; the prompts are not looked at."""
        del prompts
        return (clip.encode_images(images) @ clip.encode_images(references).T).mean(dim=1)


METRIC = ClipImage()
