"""What a format must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_diffusion.core.adapter_state import AdapterState

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap


class Format(Protocol):
    """A spelling of adapter files. One object FORMAT in `formats/<name>.py`."""

    name: str
    naming: str
    """The format whose names of modules it takes, for which families have names: its own, kohya, diffusers or peft."""
    is_folder: bool
    """True if `write` makes a folder instead of one file."""
    refused: Mapping[str, str]
    """Variant, as in ModuleAdapter, that it cannot hold -> the reason, for a message."""

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether these tensor names are in this spelling; decides by content, never by file name."""

    def portable(self, state: AdapterState) -> AdapterState:
        """Returns a state with the same changes that every program which reads the format reads right."""

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype | None) -> None:
        """Writes the state atomically and as it is; `state.metadata` becomes the file's metadata.

        Without a number type each tensor keeps its own. Arrays are taken as well as tensors.
        """

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file in float32; AdapterFileError names up to ten keys that the map does not know."""

    def read_stored(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file as `read` does, but into numpy arrays of the numbers as they are stored, and without torch."""
