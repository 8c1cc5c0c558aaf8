"""How well pictures show what their prompts say."""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor

from lora_diffusion.evaluation.clip import Clip


class ClipText:
    """Cosine of each picture and its prompt (Radford et al. 2021, arXiv 2103.00020)."""

    name = "clip_text"

    def score(self, clip: Clip, images: Sequence[Image], prompts: Sequence[str], references: Sequence[Image]) -> Tensor:
        """Returns [num_images] in -1..1; the references are not looked at."""
        del references
        return (clip.encode_images(images) * clip.encode_texts(prompts)).sum(dim=1)


METRIC = ClipText()
