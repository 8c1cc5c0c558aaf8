"""What is scored, and the scores. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class SampleLoss:
    """How well a trained adapter predicts one training picture."""

    key: str
    path: str
    caption: str
    loss: float
    """As a share of the usual loss at the same noise levels: 1 is the usual picture."""
    caption_help: float
    """How much lower the loss is with the caption than without any, in the same unit; below 0 the caption harms."""


@dataclass(frozen=True)
class Evidence:
    """What a metric judges: pictures of one candidate, or the answers of a model that writes.

    `pictures`, `meanings`, `cases` and `base_pictures` run in step, and so do `answers` and `targets`.
    """

    pictures: Sequence[Path | Image] = ()
    meanings: Sequence[str] = ()
    """What each picture should show, in words that the scorer knows."""
    cases: Sequence[int] = ()
    """Number of each picture's prompt."""
    base_pictures: Sequence[Path | Image] = ()
    """What the base alone drew for the same prompt from the same noise."""
    references: Sequence[Path | Image] = ()
    """Real pictures of what was trained, other than those it was trained on."""
    training_pictures: Sequence[Path | Image] = ()
    answers: Sequence[str] = ()
    """What the model said or heard."""
    targets: Sequence[str] = ()
    """What it should have."""
    scorers: Any = None
    """The models that score: `scoring.scorers.Scorers`."""


@dataclass(frozen=True)
class Scores:
    """What a metric finds."""

    values: Tensor
    """Float32 on the CPU: one for each picture or answer, or for each prompt if the metric is `per_prompt`."""
    details: Sequence[str] = ()
    """What there is to say of each value; none if there is nothing."""
    weights: Tensor | None = None
    """What each value counts in the mean; None if all count alike."""

    def mean(self) -> float:
        """Returns the weighted mean."""
        if self.weights is None:
            return self.values.mean().item()
        return ((self.values * self.weights).sum() / self.weights.sum()).item()
