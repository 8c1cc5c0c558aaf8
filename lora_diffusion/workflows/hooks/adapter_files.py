"""The adapter files of a run: at its end, and while it goes on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_diffusion.adapters.state import read_state
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.data.batches import Batches
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.training import record, run_files
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import Hook
from lora_diffusion.workflows import _run_checkpoints, verify


class AdapterFiles(Hook):
    """Writes the adapter of a run in all formats of `output.formats`, each verified.

    While the run goes on these are `<name>-000200.safetensors` after step, or epoch, 200, as `train.save_adapter_*`
    says; at its end `<name>.safetensors`.
    """

    def __init__(self, run: CheckedRun, loaded: Loaded, batches: Batches) -> None:
        """Takes the base that will carry the adapter, and the batches, which give the length of an epoch."""
        train = run.config.train
        self._run, self._loaded, self._batches = run, loaded, batches
        self._unit = batches.num_steps_per_epoch if train.save_adapter_every_epochs else 1
        self._every = train.save_adapter_every_steps or train.save_adapter_every_epochs * batches.num_steps_per_epoch
        self.final: tuple[Path, ...] = ()
        """Files of the finished run; none on other processes than the main one."""
        self.best: tuple[Path, ...] = ()
        """With data.validation, those of the best step, where that is not the last."""

    def begin(self, step: int) -> None:
        """Writes the metadata of the adapter, for files written from checkpoints."""
        run = self._run
        if self._every > run.num_steps:
            logger.warning("train.save_adapter_every_*: no file is due in the %d steps of this run.", run.num_steps)
        write_json(run.folder.path / record.METADATA_NAME, self._metadata(read_state(self._loaded), step))

    def on_step(self, step: int) -> None:
        """Writes the adapter if the step is due."""
        if not self._every or step % self._every:
            return
        folder, count = self._run.folder, step // self._unit
        names = folder.adapter_names(self._run.config, count)
        run_files.claim(folder.path, names, f"step {step}")
        state, stem = read_state(self._loaded), f"{folder.name(self._run.config)}-{count:06d}"
        metadata = record.at_step(self._metadata(state, step), step, stem, time.time())
        self._write(replace(state, metadata=metadata), names)
        logger.info("step %d  wrote %s", step, ", ".join(names))

    def finish(self, step: int) -> None:
        """Writes the adapter of the run."""
        state = read_state(self._loaded)
        names = self._run.folder.adapter_names(self._run.config)
        self.final = self._write(replace(state, metadata=self._metadata(state, step)), names)

    def write_best(self, best_step: int | None, last_step: int) -> None:
        """Writes `<name>-best` of the checkpoint with the best score, unless that is the last."""
        folder = self._run.folder
        names = folder.best_names(self._run.config)
        if best_step is None or best_step == last_step:
            run_files.discard(folder.path, set(names) & run_files.written(folder.path))
            return
        run_files.claim(folder.path, names, "data.validation")
        _, state = _run_checkpoints.read(_run_checkpoints.at_step(folder.path, best_step))
        self.best = self._write(state, names)

    def _metadata(self, state: AdapterState, step: int) -> dict[str, str]:
        return record.metadata(self._run, self._batches, state, step)

    def _write(self, state: AdapterState, names: Sequence[str]) -> tuple[Path, ...]:
        family, config = self._run.family, self._run.config
        paths, dtype = [self._run.folder.path / name for name in names], find_dtype(config.output.dtype)
        for format_name, path in zip(config.output.formats, paths, strict=True):
            format_: Format = registry.find("formats", format_name)
            write_verified(state, family.key_map(format_name, config.model), format_, path, dtype)
            verify.warn(path, verify.app_errors(path, format_name, family, config.model, ()))
        return tuple(paths)
