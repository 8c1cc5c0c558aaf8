"""The loss of each training image after training, with its caption and without: bad captions and odd images show.

While a run goes on, the loss of an image says nothing: it depends on the noise level that was drawn far more than on
the image. So each image is given the same draws here, and each loss is divided by the usual one at its noise level.

What training prepared is used: in a batch of images `num_captions`, `num_priors` and `num_anchors` say how many
captions of each sort may be drawn of each sample, and beside each column NAME of texts stands NAME_empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.core.base_model import Loaded, LossOutput
from lora_diffusion.core.evidence import SampleLoss
from lora_diffusion.core.files import read_json, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch, Prepared
from lora_diffusion.runtime.progress import watch
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import Hook
from lora_diffusion.training.trainer import without_gradient

LOSSES_NAME = "picture_losses.json"
MAX_IMAGES = 500
SMALLEST_RUN = 100
"""Steps below which only `evaluate.picture_draws` makes images measured: little was learnt that could show."""
SHARE = 0.03
"""Of the forward passes of training, and of the samples in them, that may go into these losses."""
_USUAL_DRAWS, _FEWEST_DRAWS, _FEWEST_IMAGES = 8, 2, 2
_NUM_LEVELS = 8
"""Bins of noise levels in which the usual loss is taken."""


@dataclass(frozen=True)
class Budget:
    """How many images are measured, and with how many draws each; 0 measures none."""

    num_images: int = 0
    num_draws: int = 0


class ImageLosses(Hook):
    """Writes the losses of training images once the run is done, as far as `evaluate.picture_draws` says."""

    def __init__(self, run: CheckedRun, loaded: Loaded, items: Sequence[Prepared]) -> None:
        """Takes what training prepared of the samples, in their order."""
        self._run, self._items = run, items
        self._losses = without_gradient(run.loss(loaded), run.config.train.precision, loaded.device)

    def finish(self, step: int) -> None:
        """Measures and writes."""
        run, train, num_samples = self._run, self._run.config.train, len(self._run.samples)
        chosen = self._budget(num_samples, step)
        if not chosen.num_images:
            if run.config.evaluate.picture_draws is None:
                logger.info(
                    "Too few steps to take the losses of single images; evaluate.picture_draws=8 asks for them."
                )
            return
        if chosen.num_images < num_samples:
            logger.info("The losses of the first %d of %d images are taken.", chosen.num_images, num_samples)
        losses = measure(
            self._losses,
            run.family.collate,
            run.samples[: chosen.num_images],
            watch(self._items[: chosen.num_images], chosen.num_images, "Losses of training images"),
            num_draws=chosen.num_draws,
            batch_size=train.batch_size,
            seed=train.seed,
        )
        write_json(run.folder.path / LOSSES_NAME, [vars(loss) for loss in losses])

    def _budget(self, num_samples: int, num_steps: int) -> Budget:
        num_draws, train = self._run.config.evaluate.picture_draws, self._run.config.train
        if num_draws is not None:
            return Budget(min(num_samples, MAX_IMAGES) if num_draws else 0, num_draws)
        if num_steps < SMALLEST_RUN:
            return Budget()
        return budget(num_samples, num_steps * train.gradient_accumulation, train.batch_size)


def hooks(run: CheckedRun, loaded: Loaded, items: Sequence[Prepared]) -> list[ImageLosses]:
    """Returns the hook, if the samples of the run are images."""
    return [ImageLosses(run, loaded, items)] if run.sample_type.makes_images else []


def budget(num_images: int, num_passes: int, batch_size: int) -> Budget:
    """Returns what may be measured where nothing is set: fewer draws before fewer images.

    Args:
        num_images: of the data set.
        num_passes: forward passes of training.
        batch_size: samples in a pass.
    """
    most = min(num_images, MAX_IMAGES)
    fewest = -(-_FEWEST_DRAWS // batch_size)
    # An image takes two passes for each batch of draws: one with its caption and one without.
    pairs = int(SHARE * num_passes) // 2
    chosen = min(most, pairs // fewest)
    if chosen < min(most, _FEWEST_IMAGES):
        return Budget()
    return Budget(chosen, min(pairs // chosen * batch_size, _USUAL_DRAWS))


def with_one_caption(batch: Batch) -> Batch:
    """Returns the batch as it is measured: with the first caption of each sample, never one without trigger words."""
    none = torch.zeros(len(batch)).long()
    counts = {"num_captions": torch.ones(len(batch)).long(), "num_priors": none, "num_anchors": none}
    return replace(batch, tensors={**batch.tensors, **counts})


def without_caption(batch: Batch) -> Batch:
    """Returns the batch with the empty caption in the place of each sample's own."""
    tensors = batch.tensors
    empty = {name: tensors[f"{name}_empty"][:, None] for name in tensors if f"{name}_empty" in tensors}
    return with_one_caption(replace(batch, tensors={**tensors, **empty}))


def measure(
    losses: Callable[[Batch, torch.Generator], LossOutput],
    collate: Callable[[Sequence[Prepared]], Batch],
    samples: Sequence[Any],
    items: Iterable[Prepared],
    *,
    num_draws: int,
    batch_size: int,
    seed: int,
) -> list[SampleLoss]:
    """Returns the losses of the samples, in their order.

    Args:
        losses: of a batch, as training computes them, drawing from the generator only.
        collate: stacks items.
        samples: what is measured, each an `ImageText`.
        items: the same as training has them.
        num_draws: noise levels and noises that each image is given; equal for all images of one size.
        batch_size: draws in one forward pass.
        seed: decides the draws.
    """
    sizes = [min(batch_size, num_draws - start) for start in range(0, num_draws, batch_size)]

    def losses_of(item: Prepared, view: Callable[[Batch], Batch]) -> tuple[Tensor, Tensor]:
        outputs = [losses(view(collate([item] * size)), derive(seed, "pictures", i)) for i, size in enumerate(sizes)]
        levels = [torch.zeros(len(o.per_sample)) if o.noise_levels is None else o.noise_levels.cpu() for o in outputs]
        return torch.cat([output.per_sample.float().cpu() for output in outputs]), torch.cat(levels)

    measured = [(losses_of(item, with_one_caption), losses_of(item, without_caption)) for item in items]
    captioned, blank = (torch.stack([pair[place][0] for pair in measured]) for place in (0, 1))
    usual = usual_losses(captioned, torch.stack([pair[0][1] for pair in measured]))
    values = torch.stack([captioned / usual, (blank - captioned) / usual]).mean(dim=2)
    return [
        SampleLoss(sample.key, str(sample.path), sample.captions[0], *pair)
        for sample, pair in zip(samples, values.T.tolist(), strict=True)
    ]


def usual_losses(losses: Tensor, levels: Tensor) -> Tensor:
    """Returns for each loss the mean loss of all images at its noise level, [images, draws].

    Args:
        losses: [images, draws].
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
        return [_typed(SampleLoss(**values)) for values in read_json(path)]
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s is damaged and left out (%s).", path, error)
        return []


def _typed(loss: SampleLoss) -> SampleLoss:
    texts: list[Any] = [loss.key, loss.path, loss.caption]
    if not (all(isinstance(text, str) for text in texts) and math.isfinite(loss.loss + loss.caption_help)):
        raise ValueError(f"the entry of {loss.key} is no loss of an image")
    return loss
