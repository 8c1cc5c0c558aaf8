"""Cosines of pictures with the references, in the space of any scorer."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults


class MeanLikeness(Defaults):
    """Mean cosine of each picture with all references."""

    needs = frozenset({"references"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one mean cosine for each picture."""
        (scorer,) = self.scorers
        references = evidence.scorers.see(scorer, evidence.references)
        return Scores((evidence.scorers.see(scorer, evidence.pictures) @ references.T).mean(dim=1))

    def real(self, evidence: Evidence) -> float | None:
        """Returns the mean cosine of two references, or None if there is but one."""
        (scorer,) = self.scorers
        references = evidence.scorers.see(scorer, evidence.references)
        num = len(references)
        if num < 2:
            return None
        pairs = (references @ references.T).fill_diagonal_(0)
        return pairs.sum().item() / (num * (num - 1))
