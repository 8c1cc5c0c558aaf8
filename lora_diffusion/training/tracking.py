"""Where the numbers of each step go: metrics.jsonl, the screen, and TensorBoard if asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import parse_json, read_json, write_text
from lora_diffusion.core.logs import console, logger
from lora_diffusion.core.protocols.tracker import Tracker
from lora_diffusion.core.text import name_some

METRICS_NAME = "metrics.jsonl"
PROGRESS_NAME = "progress.json"
"""Scores that are taken while a run trains."""
_LOG_EVERY_S = 30.0
_MAX_STEP, _MAX_LOSS = 10**12, 1e300
"""What is larger comes from damage, and is more than plots can take."""


class _MetricsFile:
    """One JSON line per optimizer step; lines after `done_steps`, which a stopped run left, are dropped."""

    def __init__(self, path: Path, done_steps: int) -> None:
        lines = _read_lines(path)
        _warn_of_damage(path, lines)
        write_text(path, "".join(f"{line.text}\n" for line in lines if line.values and line.step <= done_steps))
        self._stream = path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()

    def finish(self) -> None:
        self._stream.close()


class _Screen:
    """A progress bar, or now and then a line of log where there is no terminal."""

    def __init__(self, num_steps: int, done_steps: int) -> None:
        self._num_steps = num_steps
        self._loss: float | None = None
        self._first = self._next_line = time.monotonic()
        self._done_steps = done_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console(),
            disable=not console().is_terminal,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=done_steps, numbers="")
        self._bar.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        # Single losses jump with the noise level that was drawn.
        self._loss = values["loss"] if self._loss is None else 0.95 * self._loss + 0.05 * values["loss"]
        speed = values["samples"] / max(values["seconds"], 1e-9)
        numbers = f"loss {self._loss:.4f}  learning rate {values['lr']:.2e}  {speed:.3g} samples/s"
        self._bar.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        if not self._bar.disable or (now < self._next_line and step < self._num_steps):
            return
        self._next_line = now + _LOG_EVERY_S
        left_s = (now - self._first) / (step - self._done_steps) * (self._num_steps - step)
        logger.info("step %d of %d  %s  %d s left", step, self._num_steps, numbers, left_s)

    def finish(self) -> None:
        self._bar.stop()


class _TensorBoard:
    """The same numbers for TensorBoard, in the run folder."""

    def __init__(self, run_path: Path, done_steps: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker("tensorboard", logging_dir=run_path, purge_step=done_steps + 1)
        self._tracker.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._tracker.log(dict(values), step=step)

    def finish(self) -> None:
        self._tracker.finish()


def check_tracker(name: str) -> None:
    """Checks `train.tracker` before any work is done.

    Raises:
        ConfigError: unknown name.
        UnsupportedError: the package is not installed.
    """
    if name not in ("none", "tensorboard"):
        raise ConfigError(f"train.tracker={name} is unknown; use one of none, tensorboard.")
    if name == "tensorboard":
        require("tensorboard", "train.tracker=tensorboard")


@contextmanager
def open_trackers(name: str, run_path: Path, num_steps: int, done_steps: int) -> Iterator[list[Tracker]]:
    """Yields the trackers of a run on its main process and closes them at the end.

    Args:
        name: value of `train.tracker`.
        run_path: run folder; numbers that it holds for steps after `done_steps` are dropped.
        num_steps: length of the run.
        done_steps: steps that were made before.
    """
    trackers: list[Tracker] = [_MetricsFile(run_path / METRICS_NAME, done_steps), _Screen(num_steps, done_steps)]
    if name == "tensorboard":
        trackers.append(_TensorBoard(run_path, done_steps))
    try:
        yield trackers
    finally:
        for tracker in trackers:
            tracker.finish()


def read_metrics(run_path: Path) -> list[dict[str, Any]]:
    """Returns the numbers of each step of a run, one record a line; damaged lines are left out with one warning.

    Each record has a whole "step" above 0 and a finite "loss". Nothing is returned where there is no file.
    """
    path = run_path / METRICS_NAME
    lines = _read_lines(path)
    _warn_of_damage(path, lines)
    return [line.values for line in lines if line.values]


@dataclass(frozen=True)
class _Line:
    text: str
    values: dict[str, Any]
    """Empty where the line is damaged."""

    @property
    def step(self) -> int:
        return int(self.values["step"])


def _read_lines(path: Path) -> list[_Line]:
    """Returns the lines of a file; one that a kill cut short at the end has no line break and is left out."""
    if not path.is_file():
        return []
    # By bytes: a power loss leaves NULs and halves of characters, which no text decoder would take.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_Line(line.decode("utf-8", "replace"), _record(line)) for line in lines]


def _record(line: bytes) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    step, loss = values.get("step"), values.get("loss")
    # Of the rest, a gradient norm may be infinite: in fp16 such a step is left out.
    return values if type(step) is int and 0 < step < _MAX_STEP and _is_finite(loss) else {}


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -_MAX_LOSS < value < _MAX_LOSS


def _warn_of_damage(path: Path, lines: Sequence[_Line]) -> None:
    damaged = [str(number) for number, line in enumerate(lines, 1) if not line.values]
    if damaged:
        logger.warning(
            "%s: %d of %d lines are damaged and left out (line %s).",
            path,
            len(damaged),
            len(lines),
            name_some(damaged),
        )


def read_held_out(path: Path) -> list[dict[str, float]]:
    """Returns what a run recorded of held-out samples; nothing where the file is missing, damaged or of images."""
    try:
        lines = [{name: float(value) for name, value in line.items()} for line in read_json(path)]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    return [line for line in lines if len(line) > 2 and {"step", "score"} <= line.keys()]
