"""How different the images of one prompt are."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class Diversity(Defaults):
    """Mean of 1 - cosine over the pairs of a prompt's images; an adapter that only knows one image has 0.

    As DIV of Ruiz et al. 2023 (arXiv 2208.12242, section 4.3), in CLIP space instead of LPIPS.
    """

    name = "diversity"
    meaning = "how different the images of one prompt are: mean of 1 - cosine in CLIP space"
    per_prompt = True

    def score(self, evidence: Evidence) -> Scores:
        """Returns one mean distance for each prompt."""
        vectors = evidence.scorers.see("clip", evidence.images)
        cases = torch.tensor(evidence.cases)
        return Scores(torch.stack([_mean_distance(vectors[cases == case]) for case in dict.fromkeys(evidence.cases)]))

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean distance of two references, or None if there is but one."""
        references = evidence.scorers.see("clip", evidence.references)
        return _mean_distance(references).item() if len(references) > 1 else None


def _mean_distance(vectors: Tensor) -> Tensor:
    num = len(vectors)
    return (1 - vectors @ vectors.T).fill_diagonal_(0).sum() / (num * (num - 1))


METRIC = Diversity()
