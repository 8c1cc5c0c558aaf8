"""How much of the concept shows where it was not asked for."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults
from lora_diffusion.scoring.metrics.clip_image import METRIC as CLIP_IMAGE


class PromptLeak(Defaults):
    """Likeness to the references of pictures without the trigger, less that of the base's pictures."""

    name = "prompt_leak"
    meaning = "how much more than the base's do pictures without the trigger look like the references"
    higher_is_better = False
    judges = "plain"
    needs = frozenset({"references", "base_pictures"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one difference of CLIP-image cosines for each picture; 0 where nothing leaks."""
        base = Evidence(evidence.base_pictures, references=evidence.references, scorers=evidence.scorers)
        return Scores(CLIP_IMAGE.score(evidence).values - CLIP_IMAGE.score(base).values)


METRIC = PromptLeak()
