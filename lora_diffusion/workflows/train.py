"""Training, from config to files: read `train` first, every line of it is one step of the program."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.inject import inject
from lora_diffusion.config.schema import Config
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.data import cache
from lora_diffusion.runtime.autotune import use_channels_last, use_threads
from lora_diffusion.runtime.device import pick_device, process_group
from lora_diffusion.training import checkpoint, memory, record, run_files, run_folder
from lora_diffusion.training.hooks import Hook, IntervalHook
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.workflows import _judging as judging
from lora_diffusion.workflows import _validation as validation
from lora_diffusion.workflows._adapter_writing import AdapterWriter
from lora_diffusion.workflows._checks import Checked, check
from lora_diffusion.workflows._steps import make_batches
from lora_diffusion.workflows.select import Selection, select


@dataclass(frozen=True)
class TrainResult:
    """What a training run left."""

    run_path: Path
    num_steps: int
    loss: float | None
    """Mean over the last tenth of the steps; None where their record is gone."""
    files: tuple[Path, ...]
    selection: Selection | None = None
    """With evaluate.after_training: which checkpoint and weight are the best."""
    best: tuple[Path, ...] = ()
    """With data.validation: the adapter of the best step, where that is not the last."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "run": str(self.run_path),
            "steps": self.num_steps,
            "loss": self.loss,
            "files": list(map(str, self.files)),
            "best": list(map(str, self.best)),
            "selection": self.selection.to_json() if self.selection else None,
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"Trained {self.num_steps} steps. The adapter:", *(f"  {path}" for path in self.files)]
        lines += ["The best one on held-out samples:", *(f"  {path}" for path in self.best)] if self.best else []
        lines += [self.selection.text()] if self.selection else []
        return "\n".join(lines)


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Trains an adapter, writes it in every asked format, and if the config says so, chooses the best checkpoint.

    Raises:
        InputError: anything that the user can mend; raised before the base is loaded.
        RunError: the run failed; its folder can be continued with `resume`.
    """
    result = _train(config, resume=resume, overwrite=overwrite)
    # Only now, as nothing of the training is held in memory any more.
    return replace(result, selection=select(result.run_path)) if config.evaluate.after_training else result


def _train(config: Config, *, resume: bool, overwrite: bool) -> TrainResult:
    config = run_folder.as_started(config) if resume else config
    checked = check(config, resume=resume, overwrite=overwrite)
    config = checked.config
    family, sample_type, run = checked.family, checked.sample_type, checked.run
    samples, plan = checked.samples, checked.plan
    for line in plan.lines():
        logger.info(line)
    sample_type.warn(samples, config.model)

    processes = process_group()
    processes.wait_for_everyone()
    with run_folder.alone(run) if processes.is_main_process else nullcontext():
        trained = frozenset(config.adapter.parts)
        base_key = family.cache_key(config.model, trained)
        fingerprint = record.fingerprint(config, sample_type, base_key, checked.info.files, samples)
        latest = _begin(checked, fingerprint, resume=resume, overwrite=overwrite)
        use_threads(config.train.threads, run.path / "machine.json")
        loaded = family.load(config.model, pick_device())
        use_channels_last(loaded.parts.values(), loaded.device)
        with processes.main_process_first():
            items = cache.prepare(family, loaded, samples, trained, config.cache, config.data)
        hooks = [*_prepare_previews(checked, loaded)]
        hooks += judging.prepare_early_stop(config, family, loaded, samples, run, checked.num_steps)
        validating = validation.prepare(
            config,
            family,
            loaded,
            checked.held_out,
            run,
            checked.num_steps,
            lambda *given: trainer.losses(*given),  # noqa: PLW0108 - the trainer is made below, with these hooks
        )
        hooks += validating
        loaded.release(*(loaded.encoders - trained - (_needed_to_show(loaded, trained) if hooks else frozenset())))

        params = inject(loaded, plan, checked.variant, config.adapter.dropout, config.train.seed)
        if config.train.gradient_checkpointing:
            memory.checkpoint_activations(loaded.parts)
        batches = make_batches(items, family, config)

        describe = partial(record.metadata, config, checked.info, sample_type, samples, batches)
        writer = AdapterWriter(config, family, run, loaded, describe)
        hooks += writer.hooks(batches.num_steps_per_epoch, checked.num_steps)
        trainer = Trainer(
            config.train, params, partial(family.loss, loaded), run.path, hooks, fingerprint, plan.module_rates()
        )
        if resume:
            step = trainer.resume(latest)
            logger.info(f"Continuing after step {step}" if latest else f"No checkpoint in {run.path}; starting anew")
            if step < checked.num_steps and processes.is_main_process:
                run_folder.go_on(run)
        writer.begin(trainer.step)
        trainer.fit(batches)
        files = writer.finish(trainer.step)
        best = writer.finish_best(validating[0].kept_step, trainer.step) if validating else ()
        if processes.is_main_process:
            judging.write_picture_losses(config, samples, items, trainer, family, run)
    return TrainResult(run.path, trainer.step, record.final_loss(run), files, best=best)


def _begin(checked: Checked, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Makes the run folder ready, and returns the checkpoint with which the run goes on; None where it starts."""
    run, processes = checked.run, process_group()
    with processes.main_process_first():  # which takes away what a killed process left
        latest = checkpoint.find_latest(run.path) if resume else None
    if latest:
        checkpoint.check_fingerprint(latest, fingerprint)
        checkpoint.check_length(latest, checked.num_steps)
    processes.wait_for_everyone()
    if processes.is_main_process:
        run_folder.prepare(run, checked.config, overwrite=overwrite)
        write_json(run.plan_path, checked.plan.to_json())
    return latest


def _prepare_previews(checked: Checked, loaded: Loaded) -> list[Hook]:
    """Shows what the base alone makes of the requests, which also encodes prompts while the text encoder is there.

    There are none in a run that is too short for a preview.
    """
    if not checked.previews:
        return []
    config, run = checked.config, checked.run

    def draw(step: int) -> None:
        run_files.add(run.path, [f"previews/step-{step:06d}{ending}" for ending in (".png", ".tsv")])
        outputs = checked.family.generate(loaded, checked.previews)
        checked.sample_type.save(outputs, config.preview, run.previews_path / f"step-{step:06d}")

    draw(0)
    if loaded.encoders & set(config.adapter.parts):
        loaded.text_cache.clear()
    return [IntervalHook(config.train.preview_every_steps, draw)]


def _needed_to_show(loaded: Loaded, trained: frozenset[str]) -> frozenset[str]:
    """Names what previews need besides what is trained; if one encoder is trained, prompts are encoded anew by all."""
    return loaded.encoders if loaded.encoders & trained else loaded.decoders
