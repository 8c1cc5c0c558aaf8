"""Checkpoints of a run: written whole or not at all, checked before use, safetensors and JSON only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_diffusion.core.errors import CheckpointError, ConfigError
from lora_diffusion.core.files import atomic_path, read_json, remove_leftovers, save_tensors, sha256, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.training import optim
from lora_diffusion.training.optim import Params, named

NETWORKS = "networks"
"""Key of the fingerprint that names the base's networks by content; checkpoints of version 0.1.0 lack it."""
BASE_PATH = "model.path"
"""Key of the fingerprint that tells the base of those apart; it may change where NETWORKS is compared."""
_ADAPTER, _OPTIMIZER, _STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
FILES = (_ADAPTER, _OPTIMIZER, _STATE)
"""What a checkpoint is made of."""
_CHECKSUM = "state_sha256"
"""Key of the state that holds the digest of all else in it; absent in checkpoints of version 0.1.0."""
_OPTIONAL = frozenset({"hooks", _CHECKSUM})


@dataclass(frozen=True)
class TrainState:
    """All that a run needs, besides its config and data, to continue as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    num_steps: int
    """Length of the run that wrote the checkpoint."""
    fingerprint: Mapping[str, Any]
    """Setting -> value, for everything that changes the result; JSON values."""
    scaler: Mapping[str, Any]
    """State of the loss scaler; empty unless the precision is fp16."""
    versions: Mapping[str, str]
    """Package -> version, as a record."""
    hooks: Mapping[str, Any] = field(default_factory=dict)
    """Name of a hook -> its state; absent in checkpoints of version 0.1.0."""


def folder(run_path: Path) -> Path:
    """Returns the folder of a run's checkpoints."""
    return run_path / "checkpoints"


def saved_steps(run_path: Path) -> dict[int, Path]:
    """Returns step -> folder of the checkpoints of a run, oldest first, whole or not."""
    paths = {path.name.removeprefix("step-"): path for path in folder(run_path).glob("step-*") if path.is_dir()}
    return {int(step): paths[step] for step in sorted(filter(str.isdecimal, paths), key=int)}


def save(
    run_path: Path,
    state: TrainState,
    params: Params,
    optimizer: torch.optim.Optimizer,
    keep: int,
    kept: Container[int | None] = (),
) -> Path:
    """Writes `checkpoints/step-NNNNNN`, checks it, and only then deletes older ones.

    Args:
        run_path: run folder.
        state: goes with the tensors.
        params: as the trainer has them.
        optimizer: its moments are written.
        keep: so many of the newest stay; 0 keeps all.
        kept: steps that stay in any case.

    Raises:
        CheckpointError: the disk did not take it; older checkpoints are still there.
    """
    path = folder(run_path) / f"step-{state.step:06d}"
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            save_tensors({name: _plain(value) for name, value in named(params)}, temporary / _ADAPTER)
            save_tensors(_moments(params, optimizer), temporary / _OPTIMIZER)
            values = {**vars(state), "sha256": {name: sha256(temporary / name) for name in (_ADAPTER, _OPTIMIZER)}}
            write_json(temporary / _STATE, {**values, _CHECKSUM: _digest(values)})
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}. Older checkpoints are untouched; free some space and "
            "continue with --resume."
        ) from error
    if damage := _damage(path):
        raise CheckpointError(f"{path} {damage} right after it was written; check the disk, then use --resume.")
    saved = saved_steps(run_path)
    older = [step for step in saved if step <= state.step]
    for step in older[:-keep] if keep else []:
        if step not in kept:
            _delete(saved[step])
    return path


def _delete(path: Path) -> None:
    """Deletes what `save` wrote; what somebody else put beside it stays."""
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    if not any(path.iterdir()):
        path.rmdir()


def find_latest(run_path: Path) -> Path | None:
    """Returns the newest checkpoint that is whole, or None. Damaged ones are passed over with one warning."""
    if folder(run_path).is_dir():
        remove_leftovers(folder(run_path))
    damaged = []
    for path in reversed(saved_steps(run_path).values()):
        damage = _damage(path)
        if damage is None:
            break
        damaged.append(f"{path.name} {damage}")
    else:
        path = None
    if damaged:
        instead = f"{path.name} is used" if path else "none is left and training starts over"
        logger.warning("%d damaged checkpoints are skipped: %s; %s.", len(damaged), name_some(damaged), instead)
    return path


def read_state(path: Path) -> TrainState:
    """Returns the record of a whole checkpoint."""
    raw = read_json(path / _STATE)
    return TrainState(**{name: raw[name] for name in TrainState.__dataclass_fields__ if name in raw})


def check_fingerprint(path: Path, fingerprint: Mapping[str, Any]) -> None:
    """Checks that a checkpoint belongs to a run with these settings and data; it may know more than are given.

    Raises:
        ConfigError: lists the settings that differ, with both values.
    """
    # Through JSON, as the other side went: tuples become lists.
    now = json.loads(json.dumps(fingerprint))
    then = read_state(path).fingerprint
    changes = [
        f"{key}: {then.get(key, 'absent')} in the checkpoint, {now[key]} now"
        for key in sorted(now)
        if not _agree(key, then, now[key])
    ]
    if changes:
        raise ConfigError(
            f"{path} comes from a run with other settings or data, so it cannot be continued. Set them back, or start "
            "again with --overwrite or another output.path.",
            changes,
        )


def check_length(path: Path, num_steps: int) -> None:
    """Checks that a run of `num_steps` optimizer steps has not gone past its end already.

    Raises:
        ConfigError: the checkpoint is of a later step.
    """
    done = read_state(path).step
    if done > num_steps:
        raise ConfigError(
            f"The run has made {done} steps already and cannot be continued as one of {num_steps}; set train.max_steps "
            "or train.epochs higher, or start a new run in another output.path."
        )


def _agree(key: str, then: Mapping[str, Any], value: Any) -> bool:
    if key == BASE_PATH and NETWORKS in then:
        # Where the base lies may change; what it is, NETWORKS and "base" tell.
        return True
    if key not in then:
        # A setting that the version of the checkpoint did not know was as good as not given.
        return key == NETWORKS or value in ([], None, 0)
    if key == "base" and isinstance(value, str):
        # Version 0.1.0 kept the word auto for the dtype that it stood for.
        words = zip_longest(str(then[key]).split(), value.split())
        return all(old in (new, "auto") for old, new in words)
    return bool(then[key] == value)


def load_params(path: Path, params: Params) -> None:
    """Copies the adapter of a checkpoint into the parameters, bit for bit.

    Raises:
        CheckpointError: the parameters have other names or shapes.
    """
    saved = load_file(path / _ADAPTER)
    current = dict(named(params))
    unequal = [name for name in sorted({*saved, *current}) if _shape(saved.get(name)) != _shape(current.get(name))]
    if unequal:
        raise CheckpointError(
            f"{path} holds another adapter: {len(unequal)} parameters are missing on one side or have another shape. "
            "Use the adapter: section that the run was trained with.",
            unequal[:10],
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(saved[name])


def read_adapter(path: Path) -> dict[str, Tensor]:
    """Returns the adapter of a checkpoint, "part/path.tensor" -> value in any shape.

    Raises:
        CheckpointError: the checkpoint is not whole.
    """
    if damage := _damage(path):
        raise CheckpointError(f"The checkpoint {path} {damage}; it cannot be used.")
    return load_file(path / _ADAPTER)


def load_optimizer(path: Path, params: Params, optimizer: torch.optim.Optimizer) -> None:
    """Copies moments and step counts of a checkpoint into the optimizer, bit for bit."""
    saved = load_file(path / _OPTIMIZER)
    entries: dict[str, dict[str, Tensor]] = {name: {} for name, _ in named(params)}
    for key, value in saved.items():
        name, _, entry = key.rpartition("/")
        entries[name][entry] = value
    optim.load_state(optimizer, {parameter: entries[name] for name, parameter in named(params)})


def _moments(params: Params, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{entry}": _plain(value)
        for name, parameter in named(params)
        for entry, value in optim.read_state(optimizer, parameter).items()
    }


def _plain(value: Tensor | nn.Parameter) -> Tensor:
    return value.detach().cpu().contiguous()


def _shape(value: Tensor | None) -> torch.Size | None:
    return None if value is None else value.shape


def _digest(state: Mapping[str, Any]) -> str:
    """Returns the sha256 of JSON values, however they are laid out in a file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damage(path: Path) -> str | None:
    """Says what is wrong with the files of a checkpoint, or None."""
    try:
        state = read_json(path / _STATE)
        if damage := _damage_of_state(state):
            return f"{damage} {_STATE}"
        damaged = [name for name in (_ADAPTER, _OPTIMIZER) if sha256(path / name) != state["sha256"][name]]
    except FileNotFoundError as error:
        return f"lacks {Path(error.filename).name}"
    except (ValueError, OSError, TypeError, LookupError):
        return f"has an unreadable {_STATE}"
    return f"has a damaged {damaged[0]}" if damaged else None


def _damage_of_state(state: Any) -> str | None:
    known = {*TrainState.__dataclass_fields__, "sha256", _CHECKSUM}
    if not isinstance(state, dict) or known - {*state} - _OPTIONAL:
        return "has an incomplete"
    checksum = state.get(_CHECKSUM)
    rest = {name: value for name, value in state.items() if name != _CHECKSUM}
    # Without the checksum, a name that is not known is one whose letters changed, maybe that of the checksum.
    is_whole = {*state} <= known if checksum is None else checksum == _digest(rest)
    mappings = [state[name] for name in ("fingerprint", "scaler", "versions")] + [state.get("hooks", {})]
    numbers = [state["step"], state["num_steps"]]
    is_typed = all(isinstance(value, dict) for value in mappings) and all(type(number) is int for number in numbers)
    return None if is_whole and is_typed else "has a damaged"
