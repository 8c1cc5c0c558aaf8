"""How near pictures come to single training pictures: memorised ones stand out."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._defaults import Defaults


class Copying(Defaults):
    """Cosine of each picture with the training picture that is nearest to it, which is named as a detail."""

    name = "copying"
    meaning = "likeness to the nearest training picture: cosine in CLIP space"
    higher_is_better = False
    needs = frozenset({"training_pictures"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one cosine for each picture, and the nearest training picture."""
        training = evidence.scorers.see("clip", evidence.training_pictures)
        values, nearest = (evidence.scorers.see("clip", evidence.pictures) @ training.T).max(dim=1)
        return Scores(values, [str(evidence.training_pictures[index]) for index in nearest.tolist()])

    def real(self, evidence: Evidence) -> float | None:
        """Returns the score of the references, which are no copies, or None without any."""
        if not evidence.references:
            return None
        references = Evidence(
            evidence.references, training_pictures=evidence.training_pictures, scorers=evidence.scorers
        )
        return self.score(references).values.mean().item()


METRIC = Copying()
