"""Errors of the input, gathered so that all of them can be reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_diffusion.core.errors import ConfigError, LoraDiffusionError


class Errors(list[str]):
    """One text for each thing that is wrong."""

    _latest: LoraDiffusionError | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Adds an error of ours that ends the block, instead of letting it out."""
        try:
            yield
        except LoraDiffusionError as error:
            self.append(str(error).replace("\n", "\n  "))
            self._latest = error

    def stop(self, command: str) -> None:
        """Raises what was noted.

        Raises:
            LoraDiffusionError: the only error that was noted.
            ConfigError: there are several, or others.
        """
        if len(self) == 1:
            raise self._latest or ConfigError(self[0])
        if self:
            raise ConfigError(f"{command} found {len(self)} errors; nothing was done.", self)
