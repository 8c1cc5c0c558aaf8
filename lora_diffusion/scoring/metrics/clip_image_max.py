"""How much images look like the nearest reference."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class ClipImageMax(Defaults):
    """Cosine of each image with the reference that is nearest to it."""

    name = "clip_image_max"
    meaning = "how much the image looks like the nearest reference: cosine in CLIP space"
    needs = frozenset({"references"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one cosine for each image."""
        references = evidence.scorers.see("clip", evidence.references)
        return Scores((evidence.scorers.see("clip", evidence.images) @ references.T).amax(dim=1))

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean over the references of the cosine with the nearest other, or None if there is but one."""
        references = evidence.scorers.see("clip", evidence.references)
        if len(references) < 2:
            return None
        return (references @ references.T).fill_diagonal_(-1).amax(dim=1).mean().item()  # type: ignore[no-any-return]


METRIC = ClipImageMax()
