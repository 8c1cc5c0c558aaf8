"""How well images show what their prompts say."""

from __future__ import annotations

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import CaptionDefaults


class ClipText(CaptionDefaults):
    """Cosine of each image and its scoring caption (CLIP-T of Ruiz et al. 2023, arXiv 2208.12242, section 4.2)."""

    name = "clip_text"
    meaning = "how well the image shows what its prompt says: cosine in CLIP space"

    def score(self, evidence: Evidence) -> Scores:
        """Returns one cosine for each image."""
        images = evidence.scorers.see("clip", evidence.images)
        return Scores((images * evidence.scorers.read("clip", evidence.scoring_captions)).sum(dim=1))

    def random_baseline(self, evidence: Evidence) -> float | None:
        """Returns the mean cosine of images with the scoring_captions of the others, or None if all mean the same."""
        distinct = list(dict.fromkeys(evidence.scoring_captions))
        cosines = evidence.scorers.see("clip", evidence.images) @ evidence.scorers.read("clip", distinct).T
        captions = torch.tensor([distinct.index(caption) for caption in evidence.scoring_captions])
        others = cosines[torch.arange(len(distinct)) != captions[:, None]]
        return others.mean().item() if len(others) else None


METRIC = ClipText()
