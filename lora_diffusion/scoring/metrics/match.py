"""How much images look like the real images of the same subject."""

from __future__ import annotations

from statistics import mean

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.text import name_some
from lora_diffusion.scoring.metrics._shared import Defaults, mean_of_pairs
from lora_diffusion.scoring.subjects import partners


class Match(Defaults):
    """Mean cosine of each image with the references whose captions name the subject that its own scoring caption names.

    So an image of another subject in the right style scores low, as does one of the right subject in another style,
    where a mean over all references sees the style alone. Prompts whose subject no reference shows are left out.
    """

    name = "match"
    meaning = "how much the image looks like the references of the same subject: mean cosine in CLIP space"
    needs = frozenset({"references", "reference_captions"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one mean cosine for each image; NaN where no reference shows the subject."""
        paired = partners(evidence.scoring_captions, evidence.reference_captions)
        cosines = evidence.scorers.see("clip", evidence.images) @ evidence.scorers.see("clip", evidence.references).T
        rows = zip(cosines, paired, strict=True)
        values = torch.stack([row[indices].mean() for row, indices in rows])  # the mean of none is NaN
        texts = dict(zip(evidence.scoring_captions, paired, strict=True))
        alone = [text for text, indices in texts.items() if not indices]
        if len(alone) == len(texts):
            return Scores(values, warnings=[f"match is not measured: no reference shows {name_some(alone)}."])
        note = (
            f"match leaves out {len(alone)} of {len(texts)} prompt texts that no reference shows: {name_some(alone)}."
        )
        return Scores(values, warnings=[note] if alone else [])

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean cosine of two references of one subject, over the subjects that the prompts name.

        Where no subject has two references, 1: what another real image of it would score is not known then, only that
        the reference itself scores 1. None where the prompts name no subject of a reference.
        """
        groups = {tuple(group) for group in partners(evidence.scoring_captions, evidence.reference_captions) if group}
        if not groups:
            return None
        vectors = evidence.scorers.see("clip", evidence.references)
        several = [mean_of_pairs(vectors[list(group)]) for group in sorted(groups) if len(group) > 1]
        return mean(several) if several else 1.0


METRIC = Match()
