"""Edits that turn answers into their targets, counted by jiwer."""

from __future__ import annotations

from typing import ClassVar

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.extras import require
from lora_diffusion.scoring.metrics._defaults import Defaults


class ErrorRate(Defaults):
    """Edits divided by the length of the target. Case and punctuation count: make both texts alike before."""

    higher_is_better = False
    judges = "answers"
    needs = frozenset({"answers", "targets"})
    scorers = ()
    name: ClassVar[str]
    counter: ClassVar[str]
    """The function of jiwer that counts."""

    def score(self, evidence: Evidence) -> Scores:
        """Returns one rate for each answer; `Scores.mean` is the rate of the whole corpus."""
        count = getattr(require("jiwer", f"The metric {self.name}"), self.counter)
        edits, lengths = [], []
        for target, answer in zip(evidence.targets, evidence.answers, strict=True):
            found = count(target, answer)
            edits.append(found.substitutions + found.deletions + found.insertions)
            lengths.append(found.hits + found.substitutions + found.deletions)
        # An empty target counts as one word, so that words heard in silence are errors.
        weights = torch.tensor(lengths, dtype=torch.float32).clamp(min=1)
        return Scores(torch.tensor(edits, dtype=torch.float32) / weights, weights=weights)
