"""What a family must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.core.base_model import Architecture, BaseInfo, Example, Loaded, LossOutput, Part
from lora_diffusion.core.samples import PIECES, Batch, Output, Prepared, Request, Sample

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_diffusion.core.keymap import KeyMap


class Family(Protocol):
    """A family of base models. One object FAMILY in `families/<name>.py`, whose import must not import torch."""

    architecture: Architecture
    """What such a base is called; its name is the file name, and the value of `model.family`."""
    options_type: type[Any]
    """The dataclass of the `model:` section."""
    sample_type: type[Sample]
    parts: Mapping[str, Part]

    def check(self, options: Any) -> BaseInfo:
        """Looks at the base without loading weights; raises ModelError if it cannot be used."""

    def meta_modules(self, options: Any) -> dict[str, nn.Module]:
        """Builds the parts on the meta device: shapes and names, no weights."""

    def key_map(self, format_name: str, options: Any) -> KeyMap:
        """Maps modules of the parts to their names in a file; UnsupportedError if the format has no names for them.

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

    def draw(self, loaded: Loaded, batch: Batch, rng: torch.Generator) -> Any:
        """Draws all that is random of a step: views, captions, timesteps, noise. `rng` is a CPU generator.

        The batch is on the CPU, and so is what is drawn.
        """

    def loss(self, loaded: Loaded, drawn: Any) -> LossOutput:
        """Returns the loss of each sample, with no random draw; moves what it needs to the base's device."""

    def example(self, options: Any, trained: frozenset[str], batch_size: int, size: tuple[int, int]) -> Example:
        """Gives what a training step calls, for a step on fake tensors."""

    def generate(self, loaded: Loaded, requests: Sequence[Request]) -> list[Output]:
        """Answers requests; each one's noise comes from its own seed, so batching does not change an answer."""


def step_loss(family: Family, loaded: Loaded) -> Callable[[Batch, torch.Generator], LossOutput]:
    """Returns what the trainer calls: batch and CPU generator -> the loss of each sample."""
    return lambda batch, rng: family.loss(loaded, family.draw(loaded, batch, rng))
