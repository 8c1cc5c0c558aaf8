"""What a metric must offer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lora_diffusion.core.evidence import Evidence, Scores

if TYPE_CHECKING:
    pass


class Metric(Protocol):
    """A score of pictures or of answers. One object METRIC in `evaluation/metrics/<name>.py`."""

    name: str
    """The file name."""
    meaning: str
    """What it measures, in a few words for the report."""
    higher_is_better: bool
    judges: str
    """"asked": pictures whose prompts ask for what was trained. "plain": those of the other prompts. "answers": texts,
    not pictures."""
    needs: frozenset[str]
    """Fields of Evidence, besides the pictures and their meanings, that it cannot do without."""
    scorers: tuple[str, ...]
    """Kinds of models that it asks `evidence.scorers` for: "clip", "dino", "probe" or a name of its own."""
    per_prompt: bool
    """True if it gives one value for all pictures of a prompt; there must be two seeds then."""

    def score(self, evidence: Evidence) -> Scores:
        """Returns the values of one candidate; all candidates are given the same prompts and seeds."""

    def chance(self, evidence: Evidence) -> float | None:
        """Returns the score of pictures that have nothing to do with what is asked, or None if that says nothing.

        The evidence holds the pictures of the base alone.
        """

    def real(self, evidence: Evidence) -> float | None:
        """Returns the score of the references themselves, or None if that says nothing."""
