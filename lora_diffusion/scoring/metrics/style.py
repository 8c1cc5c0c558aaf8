"""How surely images are drawn as the references are."""

from __future__ import annotations

import torch

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults
from lora_diffusion.scoring.style_probe import fit_to_images


class Style(Defaults):
    """Probability that an image is of the references' look and not of the base's, by a linear probe.

    The probe is fitted to early layers of the scorer's image encoder, between the references and what the base alone
    generates of the same subjects, so that it sees how an image is drawn and not what it shows. Where it cannot tell
    held-out images apart more surely than by guessing there are no values.
    """

    name = "style"
    meaning = "how surely the image is drawn as the references are, and not as the base draws: 0 to 1"
    needs = frozenset({"references", "base_references"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one probability for each image; all NaN where the looks cannot be told apart."""
        nothing = torch.full((len(evidence.images),), torch.nan)
        try:
            probe = fit_to_images(evidence.scorers, evidence.references, evidence.base_references)
        except ModelError as error:
            return Scores(nothing, warnings=[f"style is not measured: {error}"])
        if probe is None:
            return Scores(nothing, warnings=["style is not measured: it takes three references or more."])
        remark = f"the probe tells {probe.accuracy:.0%} of {probe.held_out.numel()} held-out images"
        if not probe.is_sure:
            return Scores(nothing, warnings=[f"style is not measured: {remark}, which may be chance."])
        return Scores(probe.probability(evidence.scorers.look("clip", evidence.images)), remark=remark)

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean probability of the references, each held out; None where there are no values."""
        try:
            probe = fit_to_images(evidence.scorers, evidence.references, evidence.base_references)
        except ModelError:
            return None
        return probe.held_out_probability() if probe and probe.is_sure else None


METRIC = Style()
