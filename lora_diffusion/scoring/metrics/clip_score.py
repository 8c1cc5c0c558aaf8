"""CLIPScore, the form in which papers state how well images show their prompts."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import CaptionDefaults
from lora_diffusion.scoring.metrics.clip_text import METRIC as CLIP_TEXT

_FACTOR = 2.5


class ClipScore(CaptionDefaults):
    """2.5 * max(cosine, 0) (Hessel et al. 2021, arXiv 2104.08718, section 3)."""

    name = "clip_score"
    meaning = "CLIPScore: 2.5 times the cosine of image and prompt, at least 0"

    def score(self, evidence: Evidence) -> Scores:
        """Returns one score for each image, 0 to 2.5."""
        return Scores(_FACTOR * CLIP_TEXT.score(evidence).values.clamp(min=0))


METRIC = ClipScore()
