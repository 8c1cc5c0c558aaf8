"""What an evaluation compares: adapter files, checkpoints of a run and compositions, each at several weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.compose.plan import weighted_files
from lora_diffusion.config.schema import Config, ModelOptions
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import sha256
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.core.text import name_some
from lora_diffusion.evaluation.results import BASE, Candidate, FileHash
from lora_diffusion.evaluation.sampling import Look, look
from lora_diffusion.training import checkpoint
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._base_and_adapters import attach, read_adapter
from lora_diffusion.workflows._errors import Errors
from lora_diffusion.workflows._run_checkpoints import RunCheckpoint


@dataclass(frozen=True)
class Source:
    """An adapter on the disk."""

    name: str
    file: FileHash
    content: str
    """Hash of what it does to the base, whatever the format of its file."""
    trigger: str
    read: Callable[[], AdapterState]
    step: int | None = None


@dataclass(frozen=True)
class Entry:
    """What is evaluated at each weight: one adapter, or several together."""

    parts: tuple[tuple[Source, float], ...]

    def candidate(self, scale: float) -> Candidate:
        """Returns the entry with its weights multiplied."""
        weights = {source.name: weight * scale for source, weight in self.parts}
        if len(self.parts) > 1:
            name = "+".join(f"{source.name}:{weight:g}" for source, weight in self.parts)
            return Candidate(f"{name}@{float(scale)}", None, None, None, weights, scale)
        ((source, _),) = self.parts
        (weight,) = weights.values()
        file = source.file
        return Candidate(f"{source.name}@{float(weight)}", file.path, file.sha256, source.step, weights, weight)


def from_files(texts: Sequence[str], family: Family, model: ModelOptions, errors: Errors) -> list[Entry]:
    """Returns an entry for each FILE, FILE:WEIGHT or FILE:WEIGHT+FILE:WEIGHT; files that do not fit are errors."""
    groups = []
    for text in texts:
        with errors.noted():
            parts = weighted_files(text)
            if len({path.resolve() for path, _ in parts}) < len(parts):
                raise ConfigError(f"--adapter {text} names a file twice; name it once, with the sum of its weights.")
            groups.append(parts)
    paths = list(dict.fromkeys(path for parts in groups for path, _ in parts))
    checkpoints = {path: _run_checkpoints.find(path) for path in paths}
    stems = {path: of_run.folder.name if of_run else path.stem for path, of_run in checkpoints.items()}
    sources = {}
    for path, of_run in checkpoints.items():
        with errors.noted():
            twins = [twin for twin, stem in stems.items() if stem == stems[path]]
            name = stems[path] if len(twins) == 1 else _distinct_name(path, twins)
            sources[path] = _source(
                name, path, of_run.file if of_run else path, partial(read_adapter, path, family, model)
            )
    return [
        Entry(tuple((sources[path], weight) for path, weight in parts))
        for parts in groups
        if all(path in sources for path, _ in parts)
    ]


def _distinct_name(path: Path, twins: Sequence[Path]) -> str:
    """Returns a name of a file among others of its name; where paths are absolute, without what all have in common."""
    if not all(twin.is_absolute() for twin in twins):
        return str(path)
    return os.path.relpath(path, os.path.commonpath(twins))


def from_run(run: RunFolder, errors: Errors) -> list[Entry]:
    """Returns an entry for each whole checkpoint of a run, oldest first; where none is, the damaged ones are errors."""
    entries, damaged = [], Errors()
    saved = checkpoint.saved_steps(run.path)
    if not saved:
        errors.append(f"--run {run.path} has no checkpoint; train it, with train.save_every_steps above 0.")
    for step, path in saved.items():
        with damaged.noted():
            saved_files = RunCheckpoint(path)
            source = _source(path.name, path, saved_files.file, partial(_read_checkpoint, saved_files))
            entries.append(Entry(((replace(source, step=step), 1.0),)))
    if entries and damaged:
        logger.warning("%d damaged checkpoints are left out: %s", len(damaged), name_some(damaged))
    else:
        errors += damaged
    return entries


def _read_checkpoint(saved: RunCheckpoint) -> AdapterState:
    return _run_checkpoints.read(saved)[1]


def _source(name: str, path: Path, hashed: Path, read: Callable[[], AdapterState]) -> Source:
    # Read first: it finds what is wrong with files, which hashing them would stumble over.
    state = read()
    return Source(name, FileHash(str(path), _hash(hashed)), _content(state), _trigger(state), read)


def _hash(path: Path) -> str:
    """Returns the hash of a file, or of the files of a folder that PEFT wrote."""
    if path.is_file():
        return sha256(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    lines = [f"{file.relative_to(path).as_posix()} {sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content(state: AdapterState) -> str:
    digest = hashlib.sha256()
    for key, adapter in sorted(state):
        digest.update(repr((*key, adapter.variant, adapter.alpha)).encode())
        _add_tensors(digest, adapter.tensors)
    return digest.hexdigest()


def _add_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def triggers(entries: Sequence[Entry], run: RunFolder | None, config: Config | None, family: Family) -> list[str]:
    """Returns the words that call the adapters up, as their files or their run name them, each once."""
    words = [source.trigger for entry in entries for source, _ in entry.parts]
    if run and config:
        configured = str(getattr(config.data, "trigger", "auto"))
        words.append("" if configured == "auto" else configured)
        with Errors().noted():  # a run that has not finished has no adapter file yet
            words.append(_trigger(read_adapter(run.find_adapter(config), family, config.model)))
    return list(dict.fromkeys(filter(None, words)))


def _trigger(state: AdapterState) -> str:
    return state.metadata.get("modelspec.trigger_phrase", "")


def base_key(loaded: Loaded) -> str:
    """Returns a hash of all of a base that decides what it generates.

    That is its weights, scheduler, dtypes and device, the layer of the text encoder that is read, and the
    resolution, which images have that are requested without a size.
    """
    skip = getattr(loaded.options, "clip_skip", None)
    digest = hashlib.sha256(f"{loaded.device.type} {loaded.info.prediction} {skip} {loaded.info.resolution}".encode())
    for name, module in sorted({**loaded.parts, **loaded.modules}.items()):
        if isinstance(module, nn.Module):
            digest.update(name.encode())
            _add_tensors(digest, module.state_dict())
        elif isinstance(module, str | int | float):
            digest.update(f"{name} {module}".encode())
    scheduler = loaded.modules.get("scheduler")
    digest.update(repr(sorted(dict(getattr(scheduler, "config", {})).items(), key=str)).encode())
    return digest.hexdigest()


@dataclass
class CandidateSampler:
    """Generates with one candidate's adapters at a time."""

    family: Family
    loaded: Loaded
    entries: Mapping[str, tuple[Entry, Candidate]]
    """Candidate -> its adapters with their weights."""
    attached: tuple[str, ...] = ()
    """Names of the adapters that the base carries now."""

    def generate(self, candidate: str, requests: Sequence[Request]) -> list[Output]:
        """Generates requests as a candidate does."""
        if candidate == BASE:
            self._carry(())
            return self.family.generate(self.loaded, requests)
        entry, weighted = self.entries[candidate]
        names = self._carry(entry.parts)
        weights = {names[source]: weight for source, weight in weighted.weights.items()}
        return self.family.generate(self.loaded, [replace(request, weights=weights) for request in requests])

    def _carry(self, parts: Sequence[tuple[Source, float]]) -> dict[str, str]:
        """Lets the base carry these adapters and no others; returns source -> name on the base."""
        from lora_diffusion.adapters.merge import remove

        wanted = tuple(source.name for source, _ in parts)
        if wanted != self.attached:
            remove(self.loaded)
            # What the text encoder gave for a prompt without these adapters.
            self.loaded.text_cache.clear()
            attach(self.loaded, [source.read() for source, _ in parts], [1.0] * len(parts))
            self.attached = wanted
        return {name: f"adapter{index}" for index, name in enumerate(wanted)}


def looks(entries: Mapping[str, tuple[Entry, Candidate]]) -> dict[str, Look]:
    """Returns candidate -> what generates its images; the base comes first."""
    by_name: dict[str, Look] = {BASE: ()}
    for name, (entry, candidate) in entries.items():
        by_name[name] = look((source.content, candidate.weights[source.name]) for source, _ in entry.parts)
    return by_name
