"""What may happen between steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Hook(Protocol):
    """Called by the trainer on the main process.

    A hook may draw random numbers: the trainer seeds torch anew before each step. It must leave the parameters, and the
    train or eval mode of the networks, as it found them.
    """

    def on_step(self, step: int) -> None:
        """Follows each optimizer step; `step` of them are done."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """Follows each checkpoint, which is whole and has been read back."""


class PreviewHook:
    """Draws previews at every n-th step."""

    def __init__(self, every: int, draw: Callable[[int], None]) -> None:
        """Keeps the interval in steps (0: never) and what draws the pictures of a step."""
        self._every = every
        self._draw = draw

    def on_step(self, step: int) -> None:
        """Draws if the step is due."""
        if self._every and step % self._every == 0:
            self._draw(step)

    def on_checkpoint(self, path: Path, step: int) -> None:
        """Does nothing."""
