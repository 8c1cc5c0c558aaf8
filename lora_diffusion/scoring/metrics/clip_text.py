"""How well pictures show what their prompts say."""

from __future__ import annotations

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults


class ClipText(Defaults):
    """Cosine of each picture and its meaning (CLIP-T of Ruiz et al. 2023, arXiv 2208.12242, section 4.2)."""

    name = "clip_text"
    meaning = "how well the picture shows what its prompt says: cosine in CLIP space"

    def score(self, evidence: Evidence) -> Scores:
        """Returns one cosine for each picture."""
        pictures = evidence.scorers.see("clip", evidence.pictures)
        return Scores((pictures * evidence.scorers.read("clip", evidence.meanings)).sum(dim=1))

    def chance(self, evidence: Evidence) -> float | None:
        """Returns the mean cosine of pictures with the meanings of the others, or None if all mean the same."""
        distinct = list(dict.fromkeys(evidence.meanings))
        cosines = evidence.scorers.see("clip", evidence.pictures) @ evidence.scorers.read("clip", distinct).T
        own = torch.tensor([distinct.index(meaning) for meaning in evidence.meanings])
        others = cosines[torch.arange(len(distinct)) != own[:, None]]
        return others.mean().item() if len(others) else None


METRIC = ClipText()
