"""One adapter against the base alone: same prompts, same seeds, with the trigger words and without them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.types import ImageText, Output, Request
from lora_diffusion.evaluation.clip import Clip
from lora_diffusion.evaluation.metrics.clip_image import METRIC as CLIP_IMAGE
from lora_diffusion.evaluation.metrics.clip_text import METRIC as CLIP_TEXT

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


def compare(
    draw: Draw,
    clip: Clip,
    references: Sequence[ImageText],
    images: Sequence[Image],
    adapter: str,
    template: Request,
    seeds: Sequence[int] = (0,),
) -> Comparison:
    """Draws the captions of reference pictures with and without trigger, with and without adapter, and scores them.

    Args:
        draw: the family's generate on a loaded base.
        clip: an independent scorer.
        references: pictures that were not trained on; captions hold the trigger.
        images: their pictures, in the same order.
        adapter: name of the loaded adapter.
        template: steps, guidance, size and negative prompt; prompt, seed and weights are filled in.
        seeds: each prompt is drawn once with each seed.
    """
    prompts = tuple(sample.captions[0] for sample in references for _ in seeds)
    plain = tuple(sample.prior_caption or sample.captions[0] for sample in references for _ in seeds)
    all_seeds = [seed for _ in references for seed in seeds]
    rows = []
    for label, texts, weight in (
        (WITH_BASE, prompts, 0.0),
        (WITH_ADAPTER, prompts, 1.0),
        (WITHOUT_BASE, plain, 0.0),
        (WITHOUT_ADAPTER, plain, 1.0),
    ):
        requests = [
            replace(template, prompt=text, seed=seed, weights={adapter: weight})
            for text, seed in zip(texts, all_seeds, strict=True)
        ]
        pictures = tuple(output.image for output in draw(requests))
        # The scorer knows the subject by its plain words; the trigger means nothing to it.
        rows.append(Row(label, pictures, _scores(clip, pictures, plain, images)))
    real = Row(
        "real pictures",
        tuple(images),
        _scores_of_real(clip, images, [s.prior_caption or s.captions[0] for s in references]),
    )
    return Comparison(prompts, plain, tuple(rows), real, clip.name)


def _scores(
    clip: Clip, pictures: Sequence[Image], texts: Sequence[str], references: Sequence[Image]
) -> dict[str, Interval]:
    return {
        metric.name: _interval(metric.score(clip, pictures, texts, references)) for metric in (CLIP_IMAGE, CLIP_TEXT)
    }


def _scores_of_real(clip: Clip, images: Sequence[Image], texts: Sequence[str]) -> dict[str, Interval]:
    """Scores the references against each other, each without itself."""
    vectors = clip.encode_images(images)
    similar = (vectors @ vectors.T).fill_diagonal_(0).sum(dim=1) / max(1, len(images) - 1)
    return {
        CLIP_IMAGE.name: _interval(similar),
        CLIP_TEXT.name: _interval(CLIP_TEXT.score(clip, images, texts, images)),
    }


def _interval(scores: Tensor) -> Interval:
    half = 1.96 * scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
    return Interval(scores.mean().item(), half)
