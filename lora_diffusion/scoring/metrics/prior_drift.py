"""How far pictures of prompts without the trigger moved from what the base alone draws."""

from __future__ import annotations

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults


class PriorDrift(Defaults):
    """1 - cosine of each picture with the base's picture from the same prompt and noise."""

    name = "prior_drift"
    meaning = "how far pictures without the trigger moved from the base's: 1 - cosine in CLIP space"
    higher_is_better = False
    judges = "plain"
    needs = frozenset({"base_pictures"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one distance for each picture, 0 to 2."""
        scorers = evidence.scorers
        own, base = scorers.see("clip", evidence.pictures), scorers.see("clip", evidence.base_pictures)
        return Scores((1 - (own * base).sum(dim=1)).clamp(min=0))

    def chance(self, evidence: Evidence) -> float | None:
        """Returns how far two pictures of one prompt from different seeds lie apart, or None with one seed."""
        cases, vectors = torch.tensor(evidence.cases), evidence.scorers.see("clip", evidence.pictures)
        pairs = (cases == cases[:, None]).fill_diagonal_(False)
        return (1 - vectors @ vectors.T)[pairs].mean().item() if pairs.any() else None


METRIC = PriorDrift()
