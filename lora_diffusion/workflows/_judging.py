"""What a training run does to judge itself: early stopping, and the loss of each training picture."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lora_diffusion.config.schema import Config
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import ImageText, Prepared, Request, Sample
from lora_diffusion.data import sample_types
from lora_diffusion.data.preflight import find_images
from lora_diffusion.evaluation import progress
from lora_diffusion.evaluation.select import check_metrics
from lora_diffusion.runtime.progress import watch
from lora_diffusion.scoring.clip import default_clip, load_clip
from lora_diffusion.scoring.scorers import LOADERS, Scorers
from lora_diffusion.training import picture_losses
from lora_diffusion.training.hooks import EarlyStop, Hook
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import PROGRESS_NAME
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.workflows import select


def check(config: Config, samples: Sequence[ImageText]) -> None:
    """Checks before anything is loaded that the run will be able to judge itself as `evaluate` says.

    Raises:
        InputError: it will not.
    """
    own = config.evaluate
    if not (own.after_training or own.every_steps):
        return
    _references(config)
    select.cases(config, samples[0].trigger)
    models = Scorers({"clip": default_clip(config.model.path), **select.scorers(config)})
    for kind in models.names.keys() & LOADERS.keys():
        models.find(kind)
    if own.after_training:
        select.check_name(RunFolder(Path(config.output.path)).name(config))
        check_metrics(own.metrics)
    if own.after_training and config.train.keep_checkpoints:
        logger.warning(
            "evaluate.after_training compares the last %d checkpoints only; train.keep_checkpoints=0 keeps all.",
            config.train.keep_checkpoints,
        )


def prepare_early_stop(
    config: Config, family: Family, loaded: Loaded, samples: Sequence[Sample], run: RunFolder, num_steps: int
) -> list[Hook]:
    """Looks at what the base alone draws, which also encodes the prompts while the text encoder is there.

    In a run of so few steps that no score is due, nothing is drawn.
    """
    own, preview = config.evaluate, config.preview
    if not sample_types.find(family.sample_type).makes_images or not own.every_steps or own.every_steps > num_steps:
        return []
    guidance = loaded.info.guidance if preview.guidance is None else preview.guidance
    template = Request("", 0, preview.negative, preview.num_steps, guidance)
    draw = partial(family.generate, loaded)
    judge = progress.start(
        load_clip(own.clip or default_clip(config.model.path), str(loaded.device)),
        select.cases(config, getattr(samples[0], "trigger", "")),
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
    return find_images(str(config.evaluate.references), "evaluate.references")


def write_picture_losses(
    config: Config,
    samples: Sequence[Sample],
    items: Sequence[Prepared],
    trainer: Trainer,
    family: Family,
    run: RunFolder,
) -> None:
    """Writes the losses of training pictures with the adapter as it is now, as far as `evaluate.picture_draws` says.

    Args:
        config: the run's config.
        samples: of the run.
        items: what training prepared of them.
        trainer: has made the steps.
        family: of the base.
        run: where they are written.
    """
    if not sample_types.find(family.sample_type).makes_images:
        return
    chosen = _pictures_to_measure(config, len(samples), trainer.step)
    if not chosen.num_pictures:
        if config.evaluate.picture_draws is None:
            logger.info("Too few steps to take the losses of single pictures; evaluate.picture_draws=8 asks for them.")
        return
    if chosen.num_pictures < len(samples):
        logger.info("The losses of the first %d of %d pictures are taken.", chosen.num_pictures, len(samples))
    losses = picture_losses.measure(
        trainer.losses,
        family.collate,
        samples[: chosen.num_pictures],
        watch(items[: chosen.num_pictures], chosen.num_pictures, "Losses of training pictures"),
        num_draws=chosen.num_draws,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
    )
    write_json(run.path / picture_losses.LOSSES_NAME, [vars(own) for own in losses])


def _pictures_to_measure(config: Config, num_pictures: int, num_steps: int) -> picture_losses.Budget:
    asked = config.evaluate.picture_draws
    if asked is not None:
        return picture_losses.Budget(min(num_pictures, picture_losses.MAX_PICTURES) if asked else 0, asked)
    if num_steps < picture_losses.SMALLEST_RUN:
        return picture_losses.Budget()
    train = config.train
    return picture_losses.budget(num_pictures, num_steps * train.gradient_accumulation, train.batch_size)
