"""Which image of a prompt people would choose."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import CaptionDefaults

_FACTOR = 100.0


class Preference(CaptionDefaults):
    """100 times the cosine of image and scoring caption in a CLIP that was tuned on people's choices.

    Such are PickScore (Kirstain et al. 2023, arXiv 2305.01569, section 4) and HPS v2 (Wu et al. 2023, arXiv
    2306.09341, section 4); `--scorer preference=NAME` names one.
    """

    name = "preference"
    meaning = "how people would like the image for its prompt: 100 times the cosine in a CLIP tuned on their choices"
    scorers = ("preference",)

    def score(self, evidence: Evidence) -> Scores:
        """Returns one score for each image; only differences mean something, see the papers."""
        images = evidence.scorers.see("preference", evidence.images)
        return Scores(_FACTOR * (images * evidence.scorers.read("preference", evidence.scoring_captions)).sum(dim=1))


METRIC = Preference()
