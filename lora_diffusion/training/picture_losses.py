"""The loss of each training picture after training, with its caption and without: bad captions and odd pictures show.

While a run goes on, the loss of a picture says nothing: it depends on the noise level that was drawn far more than on
the picture. So each picture is given the same draws here, and each loss is divided by the usual one at its noise level.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.core.logs import logger
from lora_diffusion.core.rng import derive
from lora_diffusion.core.types import Batch, ImageText, LossOutput, Prepared, SampleLoss

LOSSES_NAME = "picture_losses.json"
MAX_PICTURES = 500
_NUM_LEVELS = 8
"""Bins of noise levels in which the usual loss is taken."""


def without_caption(sample: ImageText) -> ImageText:
    """Returns the sample with an empty caption."""
    return replace(sample, captions=("",), prior_captions=())


def with_one_caption(sample: ImageText) -> ImageText:
    """Returns the sample as it is measured: with its first caption and never with those without trigger words."""
    return replace(sample, captions=sample.captions[:1], prior_captions=())


def measure(
    losses: Callable[[Batch, torch.Generator], LossOutput],
    collate: Callable[[Sequence[Prepared]], Batch],
    samples: Sequence[ImageText],
    items: Sequence[Prepared],
    blanks: Sequence[Prepared],
    *,
    num_draws: int,
    batch_size: int,
    seed: int,
) -> list[SampleLoss]:
    """Returns the losses of the samples, in their order.

    Args:
        losses: of a batch, as training computes them, drawing from the generator only.
        collate: stacks items.
        samples: what is measured.
        items: the same, prepared `with_one_caption`.
        blanks: the same, prepared `without_caption`.
        num_draws: noise levels and noises that each picture is given; equal for all pictures of one size.
        batch_size: draws in one forward pass.
        seed: decides the draws.
    """

    def draw(item: Prepared) -> tuple[Tensor, Tensor]:
        sizes = [min(batch_size, num_draws - start) for start in range(0, num_draws, batch_size)]
        found = [losses(collate([item] * size), derive(seed, "pictures", i)) for i, size in enumerate(sizes)]
        levels = [torch.zeros(len(o.per_sample)) if o.noise_levels is None else o.noise_levels.cpu() for o in found]
        return torch.cat([output.per_sample.float().cpu() for output in found]), torch.cat(levels)

    drawn = [(draw(item), draw(blank)) for item, blank in zip(items, blanks, strict=True)]
    own, blank = (torch.stack([pair[place][0] for pair in drawn]) for place in (0, 1))
    usual = usual_losses(own, torch.stack([pair[0][1] for pair in drawn]))
    values = torch.stack([own / usual, (blank - own) / usual]).mean(dim=2)
    return [
        SampleLoss(sample.key, str(sample.path), sample.captions[0], *pair)
        for sample, pair in zip(samples, values.T.tolist(), strict=True)
    ]


def usual_losses(losses: Tensor, levels: Tensor) -> Tensor:
    """Returns for each loss the mean loss of all pictures at its noise level, [pictures, draws].

    Args:
        losses: [pictures, draws].
        levels: the same shape, 0 to 1; losses of one eighth of that range are taken together.
    """
    bins = (levels * _NUM_LEVELS).long().clamp(max=_NUM_LEVELS - 1).flatten()
    sums = torch.zeros(_NUM_LEVELS).index_add_(0, bins, losses.flatten())
    counts = torch.zeros(_NUM_LEVELS).index_add_(0, bins, torch.ones(len(bins)))
    return (sums / counts.clamp(min=1))[bins].view_as(losses)


def read_losses(run_path: Path) -> list[SampleLoss]:
    """Returns what a run measured; nothing where there is no file, and, with a warning, where it is damaged."""
    path = run_path / LOSSES_NAME
    if not path.is_file():
        return []
    try:
        return [_typed(SampleLoss(**values)) for values in json.loads(path.read_bytes())]
    except (ValueError, TypeError, RecursionError) as error:
        logger.warning("%s is damaged and left out (%s).", path, error)
        return []


def _typed(loss: SampleLoss) -> SampleLoss:
    texts: list[Any] = [loss.key, loss.path, loss.caption]
    if not (all(isinstance(text, str) for text in texts) and math.isfinite(loss.loss + loss.caption_help)):
        raise ValueError(f"the entry of {loss.key} is no loss of a picture")
    return loss
