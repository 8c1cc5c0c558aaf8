"""How many different images there are among those of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class Vendi(Defaults):
    """Vendi score: exponential of the entropy of the eigenvalues of the cosines, divided by their number.

    It is 1 where all images are the same, and their number where none has anything in common with another.

    Source: Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1.
    """

    name = "vendi"
    meaning = "Vendi score: effective number of different images among those of one prompt"
    per_prompt = True

    def score(self, evidence: Evidence) -> Scores:
        """Returns one score for each prompt, 1 to its number of images."""
        vectors = evidence.scorers.see("clip", evidence.images)
        cases = torch.tensor(evidence.cases)
        return Scores(torch.stack([_vendi(vectors[cases == case]) for case in dict.fromkeys(evidence.cases)]))

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean score of groups of references, each as many as a prompt has images; None with fewer."""
        num = len(evidence.cases) // max(1, len(dict.fromkeys(evidence.cases)))
        groups = evidence.scorers.see("clip", evidence.references).split(max(1, num))
        scores = [_vendi(group) for group in groups if len(group) == num]
        return torch.stack(scores).mean().item() if scores else None


def _vendi(vectors: Tensor) -> Tensor:
    shares = torch.linalg.eigvalsh((vectors @ vectors.T).double() / len(vectors)).clamp(min=0)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy.exp().float()


METRIC = Vendi()
