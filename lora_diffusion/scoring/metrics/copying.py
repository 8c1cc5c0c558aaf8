"""How near images come to single training images: memorised ones stand out."""

from __future__ import annotations

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import Defaults


class Copying(Defaults):
    """Cosine of each image with the training image that is nearest to it, which is named as a detail."""

    name = "copying"
    meaning = "likeness to the nearest training image: cosine in CLIP space"
    higher_is_better = False
    needs = frozenset({"training_images"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one cosine for each image, and the nearest training image."""
        training = evidence.scorers.see("clip", evidence.training_images)
        values, nearest = (evidence.scorers.see("clip", evidence.images) @ training.T).max(dim=1)
        return Scores(values, [str(evidence.training_images[index]) for index in nearest.tolist()])

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the score of the references, which are no copies, or None without any."""
        if not evidence.references:
            return None
        references = Evidence(evidence.references, training_images=evidence.training_images, scorers=evidence.scorers)
        return self.score(references).values.mean().item()


METRIC = Copying()
