"""One adapter against the base alone: same prompts, same seeds, with the trigger words and without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.evidence import Evidence
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.scoring.clip import Clip
from lora_diffusion.scoring.metrics.clip_image import METRIC as CLIP_IMAGE
from lora_diffusion.scoring.metrics.clip_text import METRIC as CLIP_TEXT
from lora_diffusion.scoring.scorers import Scorers

Draw = Callable[[Sequence[Request]], list[Output]]


@dataclass(frozen=True)
class Interval:
    """A mean and how sure it is."""

    mean: float
    half_width: float
    """1.96 standard errors over the pictures."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


@dataclass(frozen=True)
class Row:
    """The pictures of one condition and their scores."""

    label: str
    images: tuple[Image, ...]
    scores: Mapping[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """All conditions of a comparison; equal positions share prompt and seed."""

    prompts: tuple[str, ...]
    plain_prompts: tuple[str, ...]
    rows: tuple[Row, ...]
    real: Row
    """The references themselves: what a perfect adapter would score."""
    scorer: str

    def row(self, label: str) -> Row:
        """Returns the row of a condition."""
        return next(row for row in self.rows if row.label == label)

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """Returns condition -> score -> mean and half_width."""
        return {row.label: {name: vars(score) for name, score in row.scores.items()} for row in (*self.rows, self.real)}


WITH_BASE, WITH_ADAPTER = "base, with trigger", "adapter, with trigger"
WITHOUT_BASE, WITHOUT_ADAPTER = "base, without trigger", "adapter, without trigger"
REAL = "real pictures"


@dataclass(frozen=True)
class Case:
    """What is drawn once with the trigger words and once without."""

    prompt: str
    plain: str
    """The prompt without the trigger words."""
    meaning: str
    """What the picture should show, in words that the scorer knows; a trigger means nothing to it."""


def compare(
    draw: Draw,
    clip: Clip,
    cases: Sequence[Case],
    references: Sequence[Image],
    adapter: str,
    template: Request,
    seeds: Sequence[int] = (0,),
) -> Comparison:
    """Draws every case with and without trigger, with and without adapter, and scores the pictures.

    Args:
        draw: the family's generate on a loaded base.
        clip: an independent scorer.
        cases: at least one.
        references: pictures of what was trained, but not those that were trained on.
        adapter: name of the loaded adapter.
        template: steps, guidance, size and negative prompt; prompt, seed and weights are filled in.
        seeds: each case is drawn once with each seed.
    """
    rows = []
    meanings = [case.meaning for case in cases for _ in seeds]
    prompts = tuple(case.prompt for case in cases for _ in seeds)
    plain = tuple(case.plain for case in cases for _ in seeds)
    for label, texts, weight in (
        (WITH_BASE, prompts, 0.0),
        (WITH_ADAPTER, prompts, 1.0),
        (WITHOUT_BASE, plain, 0.0),
        (WITHOUT_ADAPTER, plain, 1.0),
    ):
        requests = [
            replace(template, prompt=text, seed=seeds[index % len(seeds)], weights={adapter: weight})
            for index, text in enumerate(texts)
        ]
        pictures = tuple(output.image for output in draw(requests))
        rows.append(Row(label, pictures, _scores(clip, pictures, meanings, references)))
    return Comparison(
        prompts, plain, tuple(rows), Row(REAL, tuple(references), _score_real(clip, references)), clip.name
    )


def _scores(
    clip: Clip, pictures: Sequence[Image], texts: Sequence[str], references: Sequence[Image]
) -> dict[str, Interval]:
    scorers = Scorers({"clip": clip.name}, models={"clip": clip})
    evidence = Evidence(pictures, texts, references=references, scorers=scorers)
    return {metric.name: _interval(metric.score(evidence).values) for metric in (CLIP_IMAGE, CLIP_TEXT)}


def _score_real(clip: Clip, references: Sequence[Image]) -> dict[str, Interval]:
    """Scores the references against each other, each without itself: what a perfect adapter would reach."""
    vectors = clip.encode_images(references)
    similar = (vectors @ vectors.T).fill_diagonal_(0).sum(dim=1) / max(1, len(references) - 1)
    return {CLIP_IMAGE.name: _interval(similar)}


def _interval(scores: Tensor) -> Interval:
    half = 1.96 * scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return Interval(scores.mean().item(), half)
