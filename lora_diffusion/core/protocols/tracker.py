"""What a tracker must offer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    pass


class Tracker(Protocol):
    """Where numbers go while training runs."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Records scalars of one optimizer step."""

    def finish(self) -> None:
        """Flushes and closes."""
