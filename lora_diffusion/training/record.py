"""What a run says about itself: in its adapter file and in its checkpoints."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_diffusion.config.load import to_values
from lora_diffusion.config.schema import Config
from lora_diffusion.config.settings import may_change
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.files import content_hash, public_base, user_path
from lora_diffusion.core.privacy import public_path
from lora_diffusion.core.samples import Sample
from lora_diffusion.data.batches import Batches
from lora_diffusion.data.images import open_rgb
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.formats.metadata import BASE, LEGACY_BYTES, LEGACY_START, build, count_tags, data_url, spec_date
from lora_diffusion.runtime.device import compute_dtype, frozen_dtype, pick_device
from lora_diffusion.training import checkpoint
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.optim import learning_rate
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import read_metrics

METADATA_NAME = "metadata.json"
"""What the adapter of the run says of itself, in the run folder, for files of its checkpoints."""
_OF_OBJECTIVE = {
    "noise_offset": "noise_offset",
    "min_snr_gamma": "min_snr_gamma",
    "caption_dropout": "caption_dropout_rate",
    "clip_skip": "clip_skip",
}
"""Key of the `model:` section, where the family has it -> kohya's word for it."""


def fingerprint(run: CheckedRun) -> dict[str, Any]:
    """Returns setting -> value of all that changes the result besides the `train:` section.

    Of the samples bytes, texts and repeats are hashed; of the base the bytes of `BaseInfo.files`, and what prepares the
    samples stands as the family's `cache_key` names it.
    """
    config, values = run.config, to_values(run.config)
    settings = {
        f"{section}.{key}": value
        for section in ("model", "adapter")
        for key, value in values[section].items()
        if not may_change(type(getattr(config, section)), key) or f"{section}.{key}" == checkpoint.BASE_PATH
    }
    listed = [(one.key, one.num_repeats, *run.sample_type.identity(one, config.data)) for one in run.samples]
    hashes = {"data": json.dumps(listed), checkpoint.NETWORKS: " ".join(map(content_hash, run.info.files))}
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in hashes.items()}
    return settings | {"base": run.family.cache_key(config.model, run.trained)} | digests


def final_loss(run: RunFolder) -> float | None:
    """Returns the mean loss over the last tenth of the steps; None where their record is gone."""
    losses = [line["loss"] for line in read_metrics(run.path)]
    if not losses:
        return None
    last = losses[-max(1, len(losses) // 10) :]
    return float(sum(last) / len(last))


def metadata(run: CheckedRun, batches: Batches, state: AdapterState, step: int) -> dict[str, str]:
    """Returns the metadata of the adapter file.

    Args:
        run: what was trained on what.
        batches: how the samples were batched.
        state: the trained adapter.
        step: optimizer steps done.
    """
    config, info, samples, written_at = run.config, run.info, run.samples, time.time()
    training = {
        **_training(config, batches, step),
        # The config is written when a run begins, or goes on.
        "training_started_at": run.folder.config_path.stat().st_mtime,
        "training_finished_at": written_at,
        "cache_latents": True if info.prediction else None,
        "zero_terminal_snr": info.zero_terminal_snr if info.prediction else None,
        "network_dropout": config.adapter.dropout or None,
        "network_args": _network_args(config),
        **{word: getattr(config.model, key, None) or None for key, word in _OF_OBJECTIVE.items()},
        **run.sample_type.metadata(samples, config.data),
        "sd_model_name": Path(info.source).name,
        **_base_hashes(info),
        **(_published(run.sample_type, samples) if config.output.publish_tags else {}),
    }
    base = public_base(info.source)
    named = {BASE: base} if base else {}
    return named | build(
        state,
        architecture=run.family.architecture,
        modelspec=info.architecture,
        name=run.folder.name(config),
        written_at=written_at,
        prediction_type=info.prediction,
        training=training,
        about=_about(config, info),
        **run.sample_type.headline(samples),
    )


def at_step(metadata: Mapping[str, str], step: int, name: str, written_at: float) -> dict[str, str]:
    """Returns the metadata of a run's adapter for a file of an earlier or later step of the same run.

    Args:
        metadata: as the function of that name gives them; those of older versions may lack texts, which stay away.
        step: optimizer steps done.
        name: file name without ending.
        written_at: seconds since 1970.
    """
    per_epoch = [metadata.get(key, "") for key in ("ss_num_batches_per_epoch", "ss_gradient_accumulation_steps")]
    values = {"ss_steps": str(step), "ss_max_train_steps": str(step), "ss_output_name": name}
    values |= {"ss_training_finished_at": str(written_at), "modelspec.date": spec_date(written_at)}
    if all(text.isdecimal() and int(text) for text in per_epoch):
        batches, accumulation = map(int, per_epoch)
        epochs = str(-(-step * accumulation // batches))
        values |= {"ss_epoch": epochs, "ss_num_epochs": epochs}
    if metadata.get("modelspec.title") == metadata.get("ss_output_name"):
        values["modelspec.title"] = name
    return {**metadata, **{key: value for key, value in values.items() if key in metadata}}


def _network_args(config: Config) -> dict[str, Any]:
    settings = {name: getattr(config.adapter, name) for name in ("module_ranks", "module_alphas")}
    settings["module_learning_rates"] = config.train.module_learning_rates
    given = {name: entries for name, entries in settings.items() if entries}
    return {"parts": config.adapter.parts, "targets": config.adapter.targets, **given}


def _training(config: Config, batches: Batches, step: int) -> dict[str, Any]:
    train = config.train
    epochs = -(-step // batches.num_steps_per_epoch)
    return {
        "unet_lr": learning_rate(train, "unet") if "unet" in config.adapter.parts else None,
        "text_encoder_lr": learning_rate(train, "text_encoder") if "text_encoder" in config.adapter.parts else None,
        "learning_rate": train.learning_rate,
        "lr_scheduler": train.schedule,
        "lr_warmup_steps": train.warmup_steps,
        "optimizer": train.optimizer,
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
        "steps": step,
        "epoch": epochs,
        "num_epochs": epochs,
        "max_train_steps": step,
        "num_train_images": batches.num_samples_per_epoch,
        "num_batches_per_epoch": batches.num_steps_per_epoch * train.gradient_accumulation,
        "batch_size_per_device": train.batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation,
        "total_batch_size": train.batch_size * train.gradient_accumulation * PartialState().num_processes,
        "gradient_checkpointing": train.gradient_checkpointing,
        "mixed_precision": _precision(train.precision),
        "full_fp16": False,
    }


def check_thumbnail(config: Config) -> None:
    """Checks that `output.thumbnail` is an image.

    Raises:
        DataError: it cannot be read as one.
    """
    if config.output.thumbnail not in (None, PREVIEW):
        open_rgb(user_path(config.output.thumbnail, "output.thumbnail"))


PREVIEW = "preview"


def _about(config: Config, info: BaseInfo) -> dict[str, str | None]:
    output = config.output
    clip_skip = getattr(config.model, "clip_skip", None)
    dtype = str(frozen_dtype(config.model.dtype, pick_device())).removeprefix("torch.")
    return {
        "title": output.title,
        "author": output.author,
        "description": output.description,
        "license": output.license,
        "thumbnail": _thumbnail(config),
        "encoder_layer": None if clip_skip is None else str(clip_skip),
        "unet_dtype": dtype if info.prediction and config.model.quantization == "none" else None,
    }


def _thumbnail(config: Config) -> str | None:
    if config.output.thumbnail is None:
        return None
    if config.output.thumbnail != PREVIEW:
        return data_url(open_rgb(user_path(config.output.thumbnail, "output.thumbnail")))
    previews = sorted(RunFolder(user_path(config.output.path, "output.path")).previews_path.glob("step-*.png"))
    return data_url(open_rgb(previews[-1])) if previews else None


def _base_hashes(info: BaseInfo) -> dict[str, str]:
    """Returns kohya's hashes of a base in one file; those of a folder say nothing about its weights."""
    if not info.path.is_file():
        return {}
    with info.path.open("rb") as stream:
        stream.seek(LEGACY_START)
        legacy = hashlib.sha256(stream.read(LEGACY_BYTES)).hexdigest()[:8]
    return {"sd_model_hash": legacy, "new_sd_model_hash": content_hash(info.path)}


def _precision(precision: str) -> str:
    """Returns kohya's word for what autocast computed in."""
    dtype = str(compute_dtype(precision, pick_device()))
    return {"torch.float16": "fp16", "torch.bfloat16": "bf16"}.get(dtype, "no")


def _published(sample_type: SampleType, samples: Sequence[Sample]) -> dict[str, Any]:
    captions: dict[str, list[str]] = {}
    # A home folder is called as its user is.
    names = {sample.key: public_path(str(sample.path.parent.absolute())) for sample in samples}
    for sample in samples:
        captions.setdefault(names[sample.key], []).extend(sample_type.published_texts(sample))
    folders = Counter(names.values())
    repeats = {names[sample.key]: sample.num_repeats for sample in samples}
    dirs = {name: {"n_repeats": repeats[name], "img_count": count} for name, count in folders.items()}
    tags = {"tag_frequency": count_tags(captions)} if any(captions.values()) else {}
    return {**tags, "dataset_dirs": dirs}
