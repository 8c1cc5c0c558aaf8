"""Training, from a config to adapter files: set up, fit, export. Read `train` first, then `training/trainer.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.inject import inject
from lora_diffusion.config.schema import Config
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import Prepared
from lora_diffusion.data import cache
from lora_diffusion.data.batches import Batches, make_batches
from lora_diffusion.runtime.autotune import use_channels_last, use_threads
from lora_diffusion.runtime.device import pick_device, process_group
from lora_diffusion.training import checkpoint, image_losses, memory, previews, record, run_folder
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import Hook
from lora_diffusion.training.optim import Params
from lora_diffusion.training.trainer import Trainer
from lora_diffusion.workflows._run_checks import check
from lora_diffusion.workflows.hooks import held_out_scores, image_scores
from lora_diffusion.workflows.hooks.adapter_files import AdapterFiles
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
    """Trains an adapter, writes it in every format of `output.formats`, and if the config says so, selects the best.

    Raises:
        InputError: anything that the user can correct; raised before the base is loaded.
        RunError: the run failed; its folder can be continued with `resume`.
    """
    with setup(config, resume=resume, overwrite=overwrite) as run:
        run.fit()
        return run.export()


class TrainingRun:
    """A run that is ready to train. It keeps other processes out of its folder until it is closed."""

    def __init__(
        self, checked: CheckedRun, trainer: Trainer, batches: Batches, files: AdapterFiles, held: ExitStack
    ) -> None:
        """Takes what `setup` prepared; `held` is let go of when the run is closed."""
        self.checked, self.trainer, self.batches, self.files, self._held = checked, trainer, batches, files, held

    def fit(self) -> None:
        """Takes the steps that are left, with all that goes on beside them."""
        self.trainer.fit(self.batches)

    def export(self) -> TrainResult:
        """Writes and verifies the adapter files; then, if `evaluate.after_training` says so, selects the best.

        The run is closed in between, so that nothing of the training is in memory while checkpoints are evaluated.
        """
        folder, num_steps = self.checked.folder, self.trainer.step
        for hook in self.trainer.hooks:
            hook.finish(num_steps)
        result = TrainResult(folder.path, num_steps, record.final_loss(folder), self.files.final, best=self.files.best)
        self.close()
        return replace(result, selection=select(folder.path)) if self.checked.config.evaluate.after_training else result

    def close(self) -> None:
        """Lets go of the folder, and of all that takes memory; a second time does nothing."""
        self._held.close()
        for name in ("trainer", "batches", "files"):
            vars(self).pop(name, None)

    def __enter__(self) -> TrainingRun:
        """Returns the run, which the end of the block closes, also where it fails."""
        return self

    def __exit__(self, *error: object) -> None:
        """Closes the run."""
        self.close()


def setup(config: Config, *, resume: bool = False, overwrite: bool = False) -> TrainingRun:
    """Checks everything, takes the folder, loads the base, prepares the samples, and injects the adapter.

    Raises:
        InputError: anything that the user can correct; raised before the base is loaded.
        RunError: the base cannot be loaded, or a checkpoint does not fit.
    """
    run = check(run_folder.as_started(config) if resume else config, resume=resume, overwrite=overwrite)
    _log(run)
    processes = process_group()
    processes.wait_for_everyone()
    with ExitStack() as held:
        if processes.is_main_process:
            held.enter_context(run_folder.alone(run.folder))
        fingerprint = record.fingerprint(run)
        latest = _take_folder(run, fingerprint, resume=resume, overwrite=overwrite)
        loaded = _load(run)
        with processes.main_process_first():
            items = cache.prepare(run.family, loaded, run.samples, run.trained, run.config.cache, run.config.data)
        batches = make_batches(items, run.family.collate, run.config.train)
        files = AdapterFiles(run, loaded, batches)
        hooks = _hooks(run, loaded, items, files)
        for hook in hooks:
            hook.prepare()
        _release_encoders(run, loaded, hooks)
        params = _inject(run, loaded)
        rates = run.plan.module_rates()
        trainer = Trainer(run.config.train, params, run.loss(loaded), run.folder.path, hooks, fingerprint, rates)
        if resume:
            _resume(run, trainer, latest)
        return TrainingRun(run, trainer, batches, files, held.pop_all())


def _log(run: CheckedRun) -> None:
    """Says what is trained, and which settings do nothing."""
    for line in run.plan.lines():
        logger.info(line)
    run.sample_type.warn(run.samples, run.config.model)


def _take_folder(run: CheckedRun, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Path | None:
    """Prepares the run folder, and returns the checkpoint with which the run goes on; None where it starts."""
    folder, processes = run.folder, process_group()
    with processes.main_process_first():  # which takes away what a killed process left
        latest = checkpoint.find_latest(folder.path) if resume else None
    if latest:
        checkpoint.check_fingerprint(latest, fingerprint)
        checkpoint.check_length(latest, run.num_steps)
    processes.wait_for_everyone()
    if processes.is_main_process:
        run_folder.prepare(folder, run.config, overwrite=overwrite)
        write_json(folder.plan_path, run.plan.to_json())
    return latest


def _load(run: CheckedRun) -> Loaded:
    """Loads the base, frozen, with the threads and the memory format that suit this machine."""
    use_threads(run.config.train.threads, run.folder.path / "machine.json")
    loaded = run.family.load(run.config.model, pick_device())
    use_channels_last(loaded.parts.values(), loaded.device)
    return loaded


def _hooks(run: CheckedRun, loaded: Loaded, items: Sequence[Prepared], files: AdapterFiles) -> list[Hook]:
    """Returns all that goes on beside the steps, in the order in which it follows each of them."""
    return [
        *previews.hooks(run, loaded),
        *image_scores.hooks(run, loaded),
        files,
        *held_out_scores.hooks(run, loaded, files),
        *image_losses.hooks(run, loaded, items),
    ]


def _release_encoders(run: CheckedRun, loaded: Loaded, hooks: Sequence[Hook]) -> None:
    """Frees encoders that are neither trained nor needed to generate."""
    needed: frozenset[str] = frozenset()
    if any(hook.generates for hook in hooks):
        # Where one encoder is trained, prompts are encoded again by all.
        needed = loaded.encoders if loaded.encoders & run.trained else loaded.decoders
    loaded.release(*(loaded.encoders - run.trained - needed))


def _inject(run: CheckedRun, loaded: Loaded) -> Params:
    """Adds the adapter, which changes nothing yet, and returns what is trained of it."""
    params = inject(loaded, run.plan, run.variant, run.config.adapter.dropout, run.config.train.seed)
    if run.config.train.gradient_checkpointing:
        memory.checkpoint_activations(loaded.parts)
    return params


def _resume(run: CheckedRun, trainer: Trainer, latest: Path | None) -> None:
    step, path = trainer.resume(latest), run.folder.path
    logger.info(f"Continuing after step {step}" if latest else f"No checkpoint in {path}; starting from the beginning")
    if step < run.num_steps and trainer.processes.is_main_process:
        run_folder.go_on(run.folder)
