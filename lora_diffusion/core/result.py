"""What a command comes to: values for programs, and lines for people."""

from __future__ import annotations

from typing import Any, Protocol


class Result(Protocol):
    """What every workflow returns; the command line prints it, Python reads its fields."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, which `--json` prints."""

    def text(self) -> str:
        """Returns lines for people."""
