"""What a linear probe on CLIP makes of images: how much people like them, or whatever else it was fitted to."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class Aesthetic(Defaults):
    """A linear function of the unit CLIP vector, read from the file that `--scorer probe=FILE` names.

    Such are the LAION aesthetic predictors, which were fitted to CLIP ViT-L-14/openai: `--clip` must be that CLIP then.
    """

    name = "aesthetic"
    meaning = "score of the linear probe"
    scorers = ("clip", "probe")

    def score(self, evidence: Evidence) -> Scores:
        """Returns one score for each image, on the scale of the probe."""
        return Scores(evidence.scorers.find("probe").apply(evidence.scorers.see("clip", evidence.images)))

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean score of the references, or None without any."""
        references = Evidence(evidence.references, scorers=evidence.scorers)
        return self.score(references).values.mean().item() if evidence.references else None


METRIC = Aesthetic()
