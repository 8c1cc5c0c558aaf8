"""The records that the rooms hand to each other. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from lora_diffusion.core.protocols import AdapterSwitch


@dataclass(frozen=True)
class Sample:
    """One training example as the user gave it."""

    key: str
    """Unique name within the data set: its path below `data.path`."""
    path: Path
    """The file that holds the picture or the recording."""


@dataclass(frozen=True)
class ImageText(Sample):
    """A picture and what it shows."""

    captions: tuple[str, ...] = ()
    """Rendered captions; one of them is drawn each time the picture is used."""
    prior_caption: str | None = None
    """The caption without the trigger words, or None where no trigger is known."""
    trigger: str = ""
    """The words that call up what is trained, the same in all samples of a data set; "" where none are known."""
    num_repeats: int = 1
    """How often an epoch shows the picture."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the bucket that the picture is trained in."""
    pixels: Tensor | None = None
    """[views, 3, height, width] in -1..1, float32; set only while the sample is being prepared. One view, or two with
    `data.flip`."""


@dataclass(frozen=True)
class Prepared:
    """One sample after the encoders that are not trained; on the CPU, shared, never changed."""

    key: str
    tensors: Mapping[str, Tensor]
    group: str
    """Items can be stacked into one batch if their group is equal (the bucket, say "64x64")."""
    num_repeats: int = 1


@dataclass(frozen=True)
class Batch:
    """Stacked items of one group."""

    keys: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    position: tuple[int, int] = (0, 0)
    """(epoch, index of the batch in the epoch): with the seed, all that its random draws depend on."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.keys)


@dataclass(frozen=True)
class LossOutput:
    """What a family's loss gives for a batch."""

    per_sample: Tensor
    """[batch], float32, with gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A network of the base that can hold an adapter."""

    groups: Mapping[str, tuple[str, ...]]
    """Group name -> regular expressions; a module belongs to it if one of them matches its whole path."""


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base model without its weights."""

    resolution: int
    """Side in pixels of the square pictures it was trained on."""
    size_step: int
    """Width and height of a picture must be multiples of this."""
    architecture: str
    """`modelspec.architecture` without "/lora", say stable-diffusion-v1."""
    prediction: str
    """What the network predicts: epsilon or v_prediction."""
    source: str
    """What the user can find again: builtin:emoji, a folder, a file or a hub id."""


@dataclass
class Loaded:
    """A base model in memory: frozen and in eval mode."""

    parts: dict[str, nn.Module]
    """Networks that can hold adapters, by part name."""
    modules: dict[str, Any]
    """All else: vae, tokenizer, scheduler, ..."""
    options: Any
    """The `model:` section that it was loaded with."""
    device: torch.device
    info: BaseInfo
    encoders: frozenset[str] = frozenset()
    """Parts and modules that only prepare samples; those that are not trained can be released afterwards."""
    decoders: frozenset[str] = frozenset()
    """Those of them that are also needed to generate."""
    adapters: AdapterSwitch | None = None
    """Set by the adapters room once an adapter is injected."""
    text_cache: dict[str, Tensor] = field(default_factory=dict)
    """Prompt -> text embedding, so that previews work after the text encoder is released."""

    def release(self, *names: str) -> None:
        """Forgets parts or modules that are not needed any more, so that their memory is freed."""
        for name in names:
            self.parts.pop(name, None)
            self.modules.pop(name, None)


@dataclass(frozen=True)
class Request:
    """One picture to generate."""

    prompt: str
    seed: int
    negative: str = ""
    num_steps: int = 25
    guidance: float = 5.0
    size: tuple[int, int] | None = None
    """Width and height in pixels; None takes the base's own resolution."""
    weights: Mapping[str, float] | None = None
    """Adapter name -> weight; None leaves the adapters as they are."""


@dataclass(frozen=True)
class Output:
    """One generated picture."""

    request: Request
    image: Image


class ModuleKey(NamedTuple):
    """Names one module of a base: the part and the dotted path in it, as `named_modules()` gives it."""

    part: str
    path: str


@dataclass(frozen=True)
class ModuleAdapter:
    """The adapter of one module."""

    variant: str
    tensors: Mapping[str, Tensor]
    """For lora: "down" [rank, in, (k, k)] and "up" [out, rank, (1, 1)]; two dimensions on a linear layer, four on a
    convolution."""
    alpha: float

    @property
    def rank(self) -> int:
        """Number of rows of the down matrix."""
        return int(self.tensors["down"].shape[0])


@dataclass(frozen=True)
class AdapterState:
    """An adapter as plain data, free of any file's spelling: change of weight = alpha / rank * up @ down."""

    modules: Mapping[ModuleKey, ModuleAdapter]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def parts(self) -> tuple[str, ...]:
        """Returns the part names in the order of first appearance."""
        return tuple(dict.fromkeys(key.part for key in self.modules))

    def __iter__(self) -> Iterator[tuple[ModuleKey, ModuleAdapter]]:
        """Yields (key, adapter) in the order of the state."""
        return iter(self.modules.items())
