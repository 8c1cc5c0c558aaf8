"""All that a training run checks before its base is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.plan import plan as make_plan
from lora_diffusion.config.rules import as_written
from lora_diffusion.config.schema import AdapterConfig, Config, TrainConfig
from lora_diffusion.config.settle import give_way
from lora_diffusion.core import launch, registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import read_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import Prepared, Request, Sample
from lora_diffusion.data import cache, sample_types
from lora_diffusion.data.batches import make_batches
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.data.validation import hold_out
from lora_diffusion.formats.capabilities import check_output
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.training import optim, record, run_folder
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import check_tracker
from lora_diffusion.training.trainer import total_steps
from lora_diffusion.workflows._errors import Errors
from lora_diffusion.workflows.hooks import held_out_scores, image_scores

if TYPE_CHECKING:
    pass

_FOR_ALL = ("preview.prompts", "preview.seeds", "evaluate.every_steps", "evaluate.patience", "evaluate.metrics")
"""What matters for text-output models, too; seeds only for one that samples its answers."""
_DECIDE_STEPS = (
    "train.epochs",
    "train.max_steps",
    "data.path",
    "train.batch_size",
    "train.gradient_accumulation",
)
"""Settings by which the command line decides how many steps there are."""


def check(config: Config, *, resume: bool, overwrite: bool) -> CheckedRun:
    """Looks at config, base, data and folders; loads no weights and writes nothing.

    Raises:
        InputError: anything that the user can correct, all of it at once.
    """
    errors = Errors()

    def look(at: Callable[[], Any]) -> Any:
        with errors.noted():
            return at()
        return None

    family: Family = registry.find("families", config.model.family)
    sample_type = sample_types.find(family.sample_type)
    config = settle_variant(config)
    info = look(lambda: family.check(config.model))
    variant = look(lambda: variants.find(config.adapter.variant, config.model.quantization))
    look(lambda: launch.check_training(config.train.precision, config.train.gradient_accumulation))
    look(lambda: optim.check(config.train, pick_device()))
    look(lambda: check_tracker(config.train.tracker))
    look(lambda: cache.check(config.cache))
    look(lambda: record.check_thumbnail(config))
    if not sample_type.makes_images:
        errors += _without_effect(config)
    if variant:
        look(lambda: check_output(config.output.formats, variant.stored))
    meta_modules: Any = None
    plan = samples = num_steps = requests = meta_modules
    if info:
        meta_modules = family.meta_modules(config.model)
        unread = {} if resume and _trains_unread(RunFolder(Path(config.output.path))) else info.unread
        rates = config.train.module_learning_rates
        plan = look(lambda: make_plan(meta_modules, family.parts, config.adapter, rates, unread))
        look(lambda: _check_formats(family, config))
        samples = look(lambda: sample_type.read(config.data, info))
    held_out: Sequence[Sample] = ()
    if samples and config.data.held_out is not None:
        look(lambda: held_out_scores.metrics(config, sample_type))
        samples, held_out = look(lambda: hold_out(sample_type, config.data, info, samples)) or (None, ())
    if samples:
        num_steps = _num_steps(config, family, sample_type, samples)
        config = settle_length(config, num_steps)
        look(lambda: _check_warmup(config.train, num_steps))
    # Only now, since a run that is continued must have the very settings that are left.
    folder = look(lambda: run_folder.check(config, resume=resume, overwrite=overwrite))
    if samples and sample_type.makes_images:
        look(lambda: image_scores.check(config, samples))
    if num_steps:
        requests = look(lambda: _preview_requests(config, sample_type, samples, num_steps))
    errors.stop("train")
    return CheckedRun(
        config, family, sample_type, variant, info, meta_modules, plan, folder, samples, held_out, num_steps, requests
    )


def _trains_unread(run: RunFolder) -> bool:
    """Says whether a run was begun by a version that trained layers which the base never reads; it goes on so."""
    try:
        return "unread" not in read_json(run.plan_path)
    except (OSError, ValueError):
        return False


def _without_effect(config: Config) -> Iterator[str]:
    """Yields a line for each setting that is about generated images, of a base that generates none."""
    for name, section in (("preview", config.preview), ("evaluate", config.evaluate)):
        usual = type(section)()
        for key, value in vars(section).items():
            if value != getattr(usual, key) and f"{name}.{key}" not in _FOR_ALL:
                yield f"{name}.{key}={as_written(value)}: is about images, and this base generates none; drop this key."
    if config.output.thumbnail == record.PREVIEW:
        yield f"output.thumbnail={record.PREVIEW}: the previews of this base are no images; name one."


def _check_formats(family: Family, config: Config) -> None:
    for format_name in config.output.formats:
        family.key_map(format_name, config.model)


def _num_steps(config: Config, family: Family, sample_type: SampleType, samples: Sequence[Sample]) -> int:
    stubs = [Prepared(sample.key, {}, sample_type.group(sample), sample.num_repeats) for sample in samples]
    return total_steps(config.train, make_batches(stubs, family.collate, config.train).num_steps_per_epoch)


def _check_warmup(train: TrainConfig, num_steps: int) -> None:
    if train.epochs is not None and train.warmup_steps >= num_steps:
        raise ConfigError(
            f"train.warmup_steps={train.warmup_steps}: must be less than the {num_steps} steps that "
            f"train.epochs={train.epochs} makes of this data."
        )


def _preview_requests(
    config: Config, sample_type: SampleType, samples: Sequence[Sample], num_steps: int
) -> Sequence[Request]:
    every = config.train.preview_every_steps
    if config.output.thumbnail == record.PREVIEW and every > num_steps:
        raise ConfigError(
            f"output.thumbnail={record.PREVIEW}: no preview is generated in {num_steps} steps with "
            f"train.preview_every_steps={every}; lower it, or name an image."
        )
    requests = sample_type.previews(samples, config.preview) if every else []
    if every > num_steps:
        logger.info("No preview is made in %d steps with train.preview_every_steps=%d.", num_steps, every)
        return []
    return requests


def settle_variant(config: Config) -> Config:
    """Returns the config without settings of a file that the variant on the command line does not have."""
    adapter, variant = config.adapter, variants.find(config.adapter.variant)
    if adapter.dropout and not variant.has_dropout:
        config = give_way(config, "adapter.dropout", 0.0, "adapter.variant")
    if adapter.full and variant.stored != variants.FULL.stored:
        config = give_way(config, "adapter.full", (), "adapter.variant")
    if adapter.lokr_factor != AdapterConfig.lokr_factor and variant.name != "lokr":
        config = give_way(config, "adapter.lokr_factor", AdapterConfig.lokr_factor, "adapter.variant")
    return config


def settle_length(config: Config, num_steps: int) -> Config:
    """Returns the config without settings of a file that are longer than the steps which the command line leads to."""
    train = config.train
    if train.epochs is not None and train.warmup_steps >= num_steps:
        config = give_way(config, "train.warmup_steps", 0, *_DECIDE_STEPS)
    if config.output.thumbnail == record.PREVIEW and train.preview_every_steps > num_steps:
        config = give_way(config, "output.thumbnail", None, *_DECIDE_STEPS)
    return config
