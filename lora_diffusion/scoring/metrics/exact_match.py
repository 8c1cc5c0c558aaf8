"""Share of answers that are right to the letter."""

from __future__ import annotations

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import TextDefaults


class ExactMatch(TextDefaults):
    """1 where the answer is the target, else 0; white space at the ends does not count, case does."""

    name = "exact_match"
    meaning = "share of answers that are right to the letter"

    def score(self, evidence: Evidence) -> Scores:
        """Returns 0 or 1 for each answer."""
        pairs = zip(evidence.answers, evidence.targets, strict=True)
        return Scores(torch.tensor([float(answer.strip() == target.strip()) for answer, target in pairs]))


METRIC = ExactMatch()
