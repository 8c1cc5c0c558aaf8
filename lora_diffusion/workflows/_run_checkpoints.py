"""Checkpoints of runs, where an adapter file may be named: looked up by their path, read without the base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.errors import CheckpointError, ConfigError, InputError, UnsupportedError
from lora_diffusion.core.files import read_json
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.metadata import with_base, without_hashes
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype

if TYPE_CHECKING:
    from lora_diffusion.adapters.plan import InjectionPlan
    from lora_diffusion.config.schema import Config
    from lora_diffusion.training.run_folder import RunFolder

_ADAPTER, _STATE = "adapter.safetensors", "state.json"


@dataclass(frozen=True)
class RunCheckpoint:
    """One `checkpoints/step-NNNNNN` of a run."""

    folder: Path

    @property
    def file(self) -> Path:
        """The numbers of the adapter, in float32."""
        return self.folder / _ADAPTER

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.folder.name.removeprefix("step-"))

    @property
    def run_path(self) -> Path:
        """The run folder."""
        return self.folder.absolute().parents[1]


def find(path: Path) -> RunCheckpoint | None:
    """Returns the checkpoint that a path leads to, its folder or the adapter in it; None where it is something else."""
    folder = path.parent if path.name == _ADAPTER else path
    is_named_so = folder.name.startswith("step-") and folder.name.removeprefix("step-").isdecimal()
    return RunCheckpoint(folder) if is_named_so and (folder / _STATE).is_file() else None


def at_step(run_path: Path, step: int) -> RunCheckpoint:
    """Returns the checkpoint of a step of a run.

    Raises:
        ConfigError: there is none; names those that are there.
    """
    from lora_diffusion.training.checkpoint import saved_steps

    saved = saved_steps(run_path)
    if step not in saved:
        there = ", ".join(map(str, saved)) or "none"
        raise ConfigError(
            f"--step {step}: {run_path} has no checkpoint of that step; there are {there}. train.keep_checkpoints=0 "
            "keeps all, and train.save_adapter_every_steps writes files that are never deleted."
        )
    return RunCheckpoint(saved[step])


def read(checkpoint: RunCheckpoint) -> tuple[Family, AdapterState]:
    """Returns the family and the adapter of a checkpoint in float32, with the metadata that a file of it has.

    Raises:
        CheckpointError: it is damaged, or does not belong to the plan of its run.
        ConfigError: it does not lie in its run folder.
    """
    from lora_diffusion.adapters import variants
    from lora_diffusion.training.checkpoint import read_adapter
    from lora_diffusion.training.run_folder import RunFolder

    tensors = read_adapter(checkpoint.folder)
    run = RunFolder(checkpoint.run_path)
    if not run.config_path.is_file():
        raise ConfigError(
            f"{checkpoint.folder} is a checkpoint, and its run is not around it: {run.config_path} is missing. Name "
            "the checkpoint in its run folder, or a file that 'lora-diffusion export' wrote of it."
        )
    config = run.config()
    family: Family = registry.find("families", config.model.family)
    stored = variants.find(config.adapter.variant, config.model.quantization).stored
    modules = {}
    try:
        for module in _plan(run, config, family).modules:
            fixed = module.fixed()
            trained = {
                name: tensors[f"{module.part}/{module.path}.{name}"] for name in module.tensors if name not in fixed
            }
            modules[module.key] = ModuleAdapter(stored, trained | fixed, module.alpha)
    except KeyError as error:
        raise CheckpointError(
            f"{checkpoint.folder} lacks {error}, which the plan of its run names; was it copied from another run?"
        ) from error
    return family, AdapterState(modules, _metadata(checkpoint, run, config, family))


def _plan(run: RunFolder, config: Config, family: Family) -> InjectionPlan:
    """Returns what the run trains: from its record, which needs no base, else worked out again."""
    from lora_diffusion.adapters.plan import InjectionPlan, plan

    try:
        return InjectionPlan.from_json(read_json(run.plan_path))
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return plan(family.meta_modules(config.model), family.parts, config.adapter)


def _metadata(checkpoint: RunCheckpoint, run: RunFolder, config: Config, family: Family) -> dict[str, str]:
    from lora_diffusion.training.record import METADATA_NAME, at_step

    written_at = (checkpoint.folder / _STATE).stat().st_mtime
    stem = f"{run.name(config)}-{checkpoint.step:06d}"
    try:
        recorded = dict(read_json(run.path / METADATA_NAME))
    except (OSError, ValueError, TypeError):
        recorded = _metadata_of_finished(run, config)
    texts = {key: value for key, value in recorded.items() if isinstance(value, str)}
    return at_step(with_base(without_hashes(texts), family.architecture), checkpoint.step, stem, written_at)


def _metadata_of_finished(run: RunFolder, config: Config) -> dict[str, str]:
    """Returns what the finished adapter of a run of an older version says of itself; nothing if there is none."""
    try:
        return dict(parse_file(run.find_adapter(config)).headers[0].metadata)
    except InputError:
        return {}


@contextmanager
def as_file(path: Path) -> Iterator[Path]:
    """Yields what a path leads to, or of a checkpoint an adapter file in float32, which is deleted afterwards.

    Raises:
        CheckpointError: see `read`.
        ConfigError: see `read`.
    """
    checkpoint = find(path)
    if checkpoint is None:
        yield path
        return
    family, state = read(checkpoint)
    format_ = _format_for(family, state)
    with tempfile.TemporaryDirectory() as folder:
        stem = state.metadata.get("ss_output_name", checkpoint.folder.name)
        file = Path(folder) / (stem if format_.is_folder else f"{stem}.safetensors")
        write_verified(state, _names(checkpoint, family, format_, state), format_, file, find_dtype("fp32"))
        yield file


def _format_for(family: Family, state: AdapterState) -> Format:
    """Returns the first format that holds the adapter and has names for the modules of its base."""
    variants = {adapter.variant for _, adapter in state}
    for name in ("kohya", "diffusers", "peft"):
        format_: Format = registry.find("formats", name)
        with suppress(UnsupportedError):
            family.key_map(name, None)
            if not variants & {*format_.refused}:
                return format_
    held = " and ".join(sorted(variants))
    raise UnsupportedError(f"No format holds an adapter of variant {held} for {family.architecture.name}.")


def _names(checkpoint: RunCheckpoint, family: Family, format_: Format, state: AdapterState) -> KeyMap:
    """Returns the names of modules, of the base itself only if it is built unlike those that were published."""
    from lora_diffusion.training.run_folder import RunFolder

    names = family.key_map(format_.name, None)
    known = {key for key, _ in names}
    return (
        names
        if known >= {*state.modules}
        else family.key_map(format_.name, RunFolder(checkpoint.run_path).config().model)
    )
