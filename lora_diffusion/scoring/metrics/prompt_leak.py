"""How much of the concept shows where no prompt asks for it."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults
from lora_diffusion.scoring.metrics.clip_image import METRIC as CLIP_IMAGE


class PromptLeak(Defaults):
    """Likeness to the references of images without the trigger, less that of the base's images."""

    name = "prompt_leak"
    meaning = "how much more than the base's do images without the trigger look like the references"
    higher_is_better = False
    outputs = "control"
    needs = frozenset({"references", "base_images"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one difference of CLIP-image cosines for each image; 0 where nothing leaks."""
        base = Evidence(evidence.base_images, references=evidence.references, scorers=evidence.scorers)
        return Scores(CLIP_IMAGE.score(evidence).values - CLIP_IMAGE.score(base).values)

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns what real images of the concept in place of the base's would score, or None if there is but one."""
        real = CLIP_IMAGE.reference_score(evidence)
        base = Evidence(evidence.base_images, references=evidence.references, scorers=evidence.scorers)
        return None if real is None else real - CLIP_IMAGE.score(base).mean()


METRIC = PromptLeak()
