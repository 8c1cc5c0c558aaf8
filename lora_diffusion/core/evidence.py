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
    """How well a trained adapter predicts one training image."""

    key: str
    path: str
    caption: str
    loss: float
    """As a share of the usual loss at the same noise levels: 1 is the usual image."""
    caption_help: float
    """How much lower the loss is with the caption than without any, in the same unit; below 0 the caption harms."""


@dataclass(frozen=True)
class Concept:
    """One of several things that images are to show together."""

    trigger: str
    """The words that ask for it, by which it is also named."""
    is_style: bool
    """It is how something is drawn, and not what."""
    references: Sequence[Path | Image]
    """Real images of it."""
    base_references: Sequence[Path | Image] = ()
    """As in Evidence; of styles only."""
    alone: Sequence[Sequence[Path | Image]] = ()
    """Images by its adapter alone, each in step with those of the evidence."""


@dataclass(frozen=True)
class Evidence:
    """What a metric scores: images of one candidate, or texts of a text-output model.

    `images`, `scoring_captions`, `cases` and `base_images` run in step, and so do `answers` and `targets`.
    """

    images: Sequence[Path | Image] = ()
    scoring_captions: Sequence[str] = ()
    """What each image should show, in words that the scorer knows."""
    cases: Sequence[int] = ()
    """Number of each image's prompt."""
    prompts: Sequence[str] = ()
    """What each image was generated from."""
    base_images: Sequence[Path | Image] = ()
    """What the base alone generated for the same prompt from the same noise."""
    references: Sequence[Path | Image] = ()
    """Real images of what was trained, other than those it was trained on."""
    reference_captions: Sequence[str] = ()
    """What each reference shows, without trigger words; "" where nobody wrote it down, none at all if none has one."""
    base_references: Sequence[Path | Image] = ()
    """What the base alone generates of what the first references show, in step with them, without trigger words."""
    concepts: Sequence[Concept] = ()
    training_images: Sequence[Path | Image] = ()
    answers: Sequence[str] = ()
    """What the model wrote."""
    targets: Sequence[str] = ()
    """What it should have."""
    scorers: Any = None
    """The models that score: `scoring.scorers.Scorers`."""


@dataclass(frozen=True)
class Scores:
    """The values of a metric."""

    values: Tensor
    """Float32 on the CPU: one for each image or answer, or for each prompt if the metric is `per_prompt`.

    NaN where the metric says nothing of an image; a prompt with such an image is left out for all candidates.
    """
    details: Sequence[str] = ()
    """What there is to say of each value; none if there is nothing."""
    weights: Tensor | None = None
    """What each value counts in the mean; None if all count alike."""
    warnings: Sequence[str] = ()
    """What is to be minded of the values of all candidates, and why some, or all, are NaN."""
    remark: str = ""
    """What the values of all candidates rest on, for the report."""

    def mean(self) -> float:
        """Returns the weighted mean, without weights that of what is not NaN."""
        if self.weights is None:
            return self.values.nanmean().item()
        return ((self.values * self.weights).sum() / self.weights.sum()).item()
