"""How far images of prompts without the trigger moved from what the base alone generates."""

from __future__ import annotations

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class PriorDrift(Defaults):
    """1 - cosine of each image with the base's image from the same prompt and noise."""

    name = "prior_drift"
    meaning = "how far images without the trigger moved from the base's: 1 - cosine in CLIP space"
    higher_is_better = False
    outputs = "control"
    needs = frozenset({"base_images"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one distance for each image, 0 to 2."""
        scorers = evidence.scorers
        images, base = scorers.see("clip", evidence.images), scorers.see("clip", evidence.base_images)
        return Scores((1 - (images * base).sum(dim=1)).clamp(min=0))

    def random_baseline(self, evidence: Evidence) -> float | None:
        """Returns how far two images of one prompt from different seeds lie apart, or None with one seed."""
        cases, vectors = torch.tensor(evidence.cases), evidence.scorers.see("clip", evidence.images)
        pairs = (cases == cases[:, None]).fill_diagonal_(False)
        return (1 - vectors @ vectors.T)[pairs].mean().item() if pairs.any() else None

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns how far the references lie from the base's images, or None without any."""
        if not evidence.references:
            return None
        base = evidence.scorers.see("clip", evidence.base_images)
        return (1 - base @ evidence.scorers.see("clip", evidence.references).T).mean().item()  # type: ignore[no-any-return]


METRIC = PriorDrift()
