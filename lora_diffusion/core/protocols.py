"""The borders of the program: what a family, a format, a metric and a tracker must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.core.types import (
    PIECES,
    AdapterState,
    BaseInfo,
    Batch,
    Evidence,
    Example,
    Loaded,
    LossOutput,
    Output,
    Part,
    Prepared,
    Request,
    Sample,
    Scores,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.core.keymap import KeyMap


class Family(Protocol):
    """A kind of base model. One object FAMILY in `families/<name>.py`, whose import must not import torch."""

    name: str
    """The file name, and the value of `model.family`."""
    options_type: type[Any]
    """The dataclass of the `model:` section."""
    sample_type: type[Sample]
    parts: Mapping[str, Part]
    metrics: tuple[str, ...]

    def check(self, options: Any) -> BaseInfo:
        """Looks at the base without loading weights; raises ModelError if it cannot be used."""

    def skeleton(self, options: Any) -> dict[str, nn.Module]:
        """Builds the parts on the meta device: shapes and names, no weights."""

    def key_map(self, format_name: str, options: Any) -> KeyMap:
        """Maps modules of the parts to their names in a file; UnsupportedError if the format cannot spell them.

        Without options it maps what any base of the family may have, at once and without torch.
        """

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the base, frozen and in eval mode."""

    def cache_key(self, options: Any, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        """Names all, besides the sample, that these pieces of a prepared item depend on.

        `trained` holds the names of the trained parts.
        """

    def prepare(
        self, loaded: Loaded, samples: Sequence[Sample], trained: frozenset[str], pieces: frozenset[str] = PIECES
    ) -> list[Prepared]:
        """Runs the encoders that are not trained, over these pieces of the samples. No gradient and no random draw.

        Each piece gives tensors of its own; samples must be opened for the views only.
        """

    def collate(self, items: Sequence[Prepared]) -> Batch:
        """Stacks items of one group."""

    def loss(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> LossOutput:
        """Returns the loss of each sample; every random draw is taken from `rng`, a CPU generator.

        The batch is on the CPU, where the draws are made; the loss moves what it needs to the base's device.
        """

    def example(self, options: Any, trained: frozenset[str], batch_size: int, size: tuple[int, int]) -> Example:
        """Gives what a training step calls, for a rehearsal without numbers."""

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Draws pictures; each request's noise comes from its own seed, so batching does not change a picture."""


class Format(Protocol):
    """A spelling of adapter files. One object FORMAT in `formats/<name>.py`."""

    name: str
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


class Metric(Protocol):
    """A score of pictures or of answers. One object METRIC in `evaluation/metrics/<name>.py`."""

    name: str
    """The file name."""
    meaning: str
    """What it measures, in a few words for the report."""
    higher_is_better: bool
    judges: str
    """"asked": pictures whose prompts ask for what was trained. "plain": those of the other prompts. "answers": texts,
    not pictures."""
    needs: frozenset[str]
    """Fields of Evidence, besides the pictures and their meanings, that it cannot do without."""
    scorers: tuple[str, ...]
    """Kinds of models that it asks `evidence.scorers` for: "clip", "dino", "probe" or a name of its own."""
    per_prompt: bool
    """True if it gives one value for all pictures of a prompt; there must be two seeds then."""

    def score(self, evidence: Evidence) -> Scores:
        """Returns the values of one candidate; all candidates are given the same prompts and seeds."""

    def chance(self, evidence: Evidence) -> float | None:
        """Returns the score of pictures that have nothing to do with what is asked, or None if that says nothing.

        The evidence holds the pictures of the base alone.
        """

    def real(self, evidence: Evidence) -> float | None:
        """Returns the score of the references themselves, or None if that says nothing."""


class AdapterSwitch(Protocol):
    """Turns injected adapters up, down and off; given to families so that they need not know PEFT."""

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Sets each named adapter to its weight and every other one to 0."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the base answers as if no adapter were there."""


class Tracker(Protocol):
    """Where numbers go while training runs."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Records scalars of one optimizer step."""

    def finish(self) -> None:
        """Flushes and closes."""
