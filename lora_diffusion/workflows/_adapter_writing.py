"""The adapter files of a run: at its end, and while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_diffusion.adapters.state import read_state
from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype, process_group
from lora_diffusion.training import record, run_files
from lora_diffusion.training.hooks import Hook, IntervalHook
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints, verify


@dataclass(frozen=True)
class AdapterWriter:
    """Writes the adapter that a base carries, in all formats that are asked for; on the main process only."""

    config: Config
    family: Family
    run: RunFolder
    loaded: Loaded
    describe: Callable[[AdapterState, int], Mapping[str, str]]
    """Gives the metadata of the adapter after a step."""

    def begin(self, step: int) -> None:
        """Writes what the adapter will tell of itself, for files that are made of checkpoints."""
        if process_group().is_main_process:
            told = self.describe(read_state(self.loaded), step)
            write_json(self.run.path / record.METADATA_NAME, dict(told))

    def hooks(self, num_steps_per_epoch: int, num_steps: int) -> list[Hook]:
        """Returns what writes `<name>-000200.safetensors` after step, or epoch, 200, if that is asked for."""
        train = self.config.train
        every = train.save_adapter_every_steps or train.save_adapter_every_epochs * num_steps_per_epoch
        if every > num_steps:
            logger.warning("train.save_adapter_every_*: no file is due in the %d steps of this run.", num_steps)
        by = num_steps_per_epoch if train.save_adapter_every_epochs else 1
        return [IntervalHook(every, lambda step: self._write_at(step, step // by))] if every else []

    def finish(self, step: int) -> tuple[Path, ...]:
        """Writes the adapter of the run and returns its files; none on other processes."""
        if not process_group().is_main_process:
            return ()
        state = read_state(self.loaded)
        names = self.run.adapter_names(self.config)
        return self._write(replace(state, metadata=self.describe(state, step)), names)

    def finish_best(self, best_step: int | None, last_step: int) -> tuple[Path, ...]:
        """Writes `<name>-best` of the checkpoint with the best score, unless that is the last; returns its files."""
        names = self.run.best_names(self.config)
        if not process_group().is_main_process:
            return ()
        if best_step is None or best_step == last_step:
            run_files.discard(self.run.path, set(names) & run_files.own(self.run.path))
            return ()
        run_files.claim(self.run.path, names, "data.validation")
        _, state = _run_checkpoints.read(_run_checkpoints.at_step(self.run.path, best_step))
        return self._write(state, names)

    def _write_at(self, step: int, count: int) -> None:
        names = self.run.adapter_names(self.config, count)
        run_files.claim(self.run.path, names, f"step {step}")
        state, stem = read_state(self.loaded), f"{self.run.name(self.config)}-{count:06d}"
        told = record.at_step(self.describe(state, step), step, stem, time.time())
        self._write(replace(state, metadata=told), names)
        logger.info("step %d  wrote %s", step, ", ".join(names))

    def _write(self, state: AdapterState, names: list[str]) -> tuple[Path, ...]:
        paths = [self.run.path / name for name in names]
        model, dtype = self.config.model, find_dtype(self.config.output.dtype)
        for format_name, path in zip(self.config.output.formats, paths, strict=True):
            format_: Format = registry.find("formats", format_name)
            write_verified(state, self.family.key_map(format_name, model), format_, path, dtype)
            verify.warn(path, verify.faults(path, format_name, self.family, model, ()))
        return tuple(paths)
