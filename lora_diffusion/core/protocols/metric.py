"""What a metric must offer."""

from __future__ import annotations

from typing import Protocol

from lora_diffusion.core.evidence import Evidence, Scores


class Metric(Protocol):
    """A score of images or of texts. One object METRIC in `scoring/metrics/<name>.py`, or of another package."""

    name: str
    """The file name."""
    meaning: str
    """What it measures, in a few words for the report."""
    higher_is_better: bool
    outputs: str
    """What it scores. "concept": images whose prompts ask for what was trained. "control": those of the other prompts.
    "texts": what a text-output model wrote."""
    needs: frozenset[str]
    """Fields of Evidence, besides the images and their scoring captions, that it cannot do without."""
    scorers: tuple[str, ...]
    """Roles of the models that it asks `evidence.scorers` for: "clip", "dino", "probe" or a name of its own."""
    per_prompt: bool
    """True if it gives one value for all images of a prompt; there must be two seeds then."""

    def score(self, evidence: Evidence) -> Scores:
        """Returns the values of one candidate; all candidates are given the same prompts and seeds."""

    def random_baseline(self, evidence: Evidence) -> float | None:
        """Returns the score of images that have nothing to do with their prompts, or None if that says nothing.

        The evidence holds the images of the base alone.
        """

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the score of the references themselves, or None if that says nothing."""
