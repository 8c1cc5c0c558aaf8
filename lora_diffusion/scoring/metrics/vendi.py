"""How many different pictures there are among those of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults


class Vendi(Defaults):
    """Vendi score: exponential of the entropy of the eigenvalues of the cosines, divided by their number.

    It is 1 where all pictures are the same, and their number where none has anything in common with another.

    Source: Friedman and Dieng 2022, arXiv 2210.02410, definition 3.1.
    """

    name = "vendi"
    meaning = "Vendi score: effective number of different pictures among those of one prompt"
    per_prompt = True

    def score(self, evidence: Evidence) -> Scores:
        """Returns one score for each prompt, 1 to its number of pictures."""
        vectors = evidence.scorers.see("clip", evidence.pictures)
        cases = torch.tensor(evidence.cases)
        return Scores(torch.stack([_vendi(vectors[cases == case]) for case in dict.fromkeys(evidence.cases)]))


def _vendi(vectors: Tensor) -> Tensor:
    shares = torch.linalg.eigvalsh((vectors @ vectors.T).double() / len(vectors)).clamp(min=0)
    return torch.special.entr(shares).sum().exp().float()


METRIC = Vendi()
