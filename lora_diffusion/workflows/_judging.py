"""What a training run does to judge itself: early stopping, and the loss of each training picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import Config
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols import Family
from lora_diffusion.core.types import ImageText, Loaded, Prepared, Request, Sample
from lora_diffusion.data import cache
from lora_diffusion.data.preflight import find_pictures
from lora_diffusion.evaluation import progress
from lora_diffusion.evaluation.clip import default_clip, load_clip
from lora_diffusion.evaluation.scorers import LOADERS, Scorers
from lora_diffusion.evaluation.select import check_metrics
from lora_diffusion.training import picture_losses
from lora_diffusion.training.hooks import EarlyStop, Hook
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.workflows import selection

PROGRESS_NAME = "progress.json"


def check(config: Config, samples: Sequence[ImageText]) -> None:
    """Checks before anything is loaded that the run will be able to judge itself as `evaluate` says.

    Raises:
        InputError: it will not.
    """
    own = config.evaluate
    if not (own.after_training or own.every_steps):
        return
    _references(config)
    selection.cases(config, samples[0].trigger)
    models = Scorers(selection.scorers(config))
    for kind in models.names.keys() & LOADERS.keys():
        models.find(kind)
    if own.after_training:
        selection.check_name(RunFolder(Path(config.output.path)).name(config))
        check_metrics(own.metrics)
    if own.after_training and config.train.keep_checkpoints:
        logger.warning(
            "evaluate.after_training compares the last %d checkpoints only; train.keep_checkpoints=0 keeps all.",
            config.train.keep_checkpoints,
        )


def prepare_early_stop(
    config: Config, family: Family, loaded: Loaded, samples: Sequence[Sample], run: RunFolder
) -> list[Hook]:
    """Looks at what the base alone draws, which also encodes the prompts while the text encoder is there."""
    own, preview = config.evaluate, config.preview
    if not own.every_steps:
        return []
    guidance = loaded.info.guidance if preview.guidance is None else preview.guidance
    template = Request("", 0, preview.negative, preview.num_steps, guidance)
    draw = partial(family.generate, loaded)
    judge = progress.start(
        load_clip(own.clip or default_clip(config.model.path), str(loaded.device)),
        selection.cases(config, getattr(samples[0], "trigger", "")),
        own.seeds,
        _references(config),
        template,
        draw,
    )
    if "text_encoder" in config.adapter.parts:
        loaded.text_cache.clear()

    def record(scores: Sequence[tuple[int, float]]) -> None:
        write_json(run.path / PROGRESS_NAME, [{"step": step, "score": score} for step, score in scores])

    return [EarlyStop(own.every_steps, own.patience, lambda _: judge.score(draw), record)]


def _references(config: Config) -> list[Path]:
    return find_pictures(str(config.evaluate.references), "evaluate.references")


@dataclass(frozen=True)
class Measured:
    """What the losses of training pictures are taken from."""

    config: Config
    samples: Sequence[ImageText]
    items: Sequence[Prepared]
    blanks: Sequence[Prepared]
    """The same without captions."""


def prepare_pictures(config: Config, family: Family, loaded: Loaded, samples: Sequence[Any]) -> Measured | None:
    """Prepares training pictures with one caption and with none, while the encoders are there."""
    if not config.evaluate.picture_draws or not isinstance(samples[0], ImageText):
        return None
    if len(samples) > picture_losses.MAX_PICTURES:
        logger.warning(
            "The losses of the first %d of %d pictures will be shown.", picture_losses.MAX_PICTURES, len(samples)
        )
    shown = samples[: picture_losses.MAX_PICTURES]
    trained = frozenset(config.adapter.parts)
    own, blank = (
        cache.prepare(family, loaded, [change(sample) for sample in shown], trained, config.cache, config.data)
        for change in (picture_losses.with_one_caption, picture_losses.without_caption)
    )
    return Measured(config, shown, own, blank)


def write_picture_losses(measured: Measured | None, trainer: Trainer, family: Family, run: RunFolder) -> None:
    """Writes the loss of each training picture with the adapter as it is now."""
    if measured is None:
        return
    config = measured.config
    losses = picture_losses.measure(
        trainer.losses,
        family.collate,
        measured.samples,
        measured.items,
        measured.blanks,
        num_draws=config.evaluate.picture_draws,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )
    write_json(run.path / picture_losses.LOSSES_NAME, [vars(own) for own in losses])
