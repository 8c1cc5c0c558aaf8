"""Atomic files and resumable checkpoints shared by the training stages."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_atomic(path, lambda target: target.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8") and None)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Store tensors and plain values so that training can go on after an interruption."""
    write_atomic(path, lambda target: torch.save(state, target))


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Checkpoint of an earlier run, None at the first start. Only tensors and plain values are read."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a new folder, then swap it for `target` so that readers never see half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    old = target.parent / f".{target.name}-old-{os.getpid()}"
    try:
        fill(fresh)
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(fresh, ignore_errors=True)


class MovingAverage:
    """Exponential moving average of a module's parameters, with a warm-up of its decay."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        """Move the average towards the module's present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats, fresh = [], []
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                floats.append(self.values[name])
                fresh.append(value.detach())
            else:
                self.values[name].copy_(value)
        torch._foreach_lerp_(floats, fresh, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Values and update count, for a checkpoint."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.values, self.updates = state["values"], state["updates"]
