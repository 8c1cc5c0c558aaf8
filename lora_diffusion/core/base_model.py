"""Base models: what is known of one, what is in memory, and what a training step gives; no import of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.core.samples import Chat

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """A family of bases that share their networks: what it is called, and what programs must be told of it."""

    name: str
    """That of the family: the value of `model.family`."""
    title: str
    """What people call it."""
    modelspec: Mapping[str, str]
    """What tells its bases apart -> `modelspec.architecture` without "/lora". Diffusion bases are told apart by what
    they predict, those with text output by the `model_type` of their config."""
    implementation: str
    """`modelspec.implementation`: where the code that runs such a base comes from."""
    kohya_versions: Mapping[str, str] = field(default_factory=dict)
    """Prediction -> `ss_base_model_version`, by which A1111 and Forge list a file; empty where kohya has none."""
    is_v2: bool = False
    """`ss_v2` of kohya's files."""
    metadata_starts: tuple[str, ...] = ()
    """How `ss_base_model_version` (of kohya, then of ai-toolkit) and `modelspec.architecture` begin."""
    name_marks: tuple[str, ...] = ()
    """Expressions found in the names of a file's tensors that only this architecture gives."""

    @property
    def is_distinguished_by_prediction(self) -> bool:
        """Says whether its bases have several names, so that what they predict must be known to name one."""
        return len(set(self.modelspec.values())) > 1

    def has_modelspec(self, text: str) -> bool:
        """Says whether a `modelspec.architecture`, with or without "/lora", is one of its own."""
        return text.split("/")[0] in self.modelspec.values()


@dataclass(frozen=True)
class LossOutput:
    """What a family's loss gives for a batch."""

    per_sample: Tensor
    """[batch], float32, with gradient."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    noise_levels: Tensor | None = None
    """[batch] in 0..1, on which the size of each loss depends before all else; None where there is no such thing."""


@dataclass(frozen=True)
class Example:
    """What a training step calls, all on the meta device."""

    inputs: Mapping[str, Mapping[str, Any]]
    """Part or head -> keyword arguments, in the order of the calls."""
    heads: Mapping[str, nn.Module] = field(default_factory=dict)
    """What makes the loss out of the parts' answer, where that takes much memory; no adapter sits on it."""


@dataclass(frozen=True)
class Cut:
    """A text that is longer than what is read of it."""

    num_tokens: int
    """Of the whole text; those that begin and end it are not counted."""
    num_read: int
    """Characters of it that are read."""


class TextLimit(Protocol):
    """How much of a caption a text encoder reads."""

    @property
    def max_tokens(self) -> int:
        """Tokens that are read; those that begin and end a text are not counted."""

    def cuts(self, texts: Sequence[str]) -> list[Cut | None]:
        """Returns for each text how it is cut, or None where it is read as a whole."""

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Returns the tokens of each text, begin and end not counted."""


class AdapterSwitch(Protocol):
    """Turns injected adapters up, down and off; given to families so that they need not know PEFT."""

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Sets each named adapter to its weight and every other one to 0."""

    def disabled(self) -> AbstractContextManager[None]:
        """Within the context the base answers as if no adapter were there."""


@dataclass(frozen=True)
class Part:
    """A network of the base that can hold an adapter."""

    groups: Mapping[str, tuple[str, ...]]
    """Group name -> regular expressions; a module belongs to it if one of them matches its whole path."""


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base model without its weights."""

    resolution: int
    """Side in pixels of the square images it was trained on."""
    size_step: int
    """Width and height of an image must be multiples of this."""
    architecture: str
    """`modelspec.architecture` without "/lora", say stable-diffusion-v1."""
    prediction: str
    """What the network predicts: epsilon or v_prediction."""
    source: str
    """What the user can find again: builtin:emoji, a folder, a file or a hub id."""
    guidance: float = 7.0
    """Classifier-free guidance scale of requests that give none."""
    zero_terminal_snr: bool = False
    """Whether the last timestep of its schedule holds no signal."""
    path: Path = Path()
    """Where it lies on this machine; what a hub id names is fetched by then."""
    files: tuple[Path, ...] = ()
    """Those there that decide what training sees: weights of its parts, settings of its noise schedule."""
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Part -> regular expressions of the paths of modules whose output nothing reads, so that an adapter there learns
    nothing."""
    text_limit: TextLimit | None = field(default=None, compare=False, repr=False)
    """How much of a caption is read; None where captions are not, or may have any length."""


@dataclass(frozen=True)
class SpeechInfo(BaseInfo):
    """What is known of a base of speech recognition; it has no resolution, size_step and prediction."""

    resolution: int = 0
    size_step: int = 1
    architecture: str = ""
    prediction: str = ""
    source: str = ""
    sampling_rate: int = 16000
    """In Hz."""
    max_duration_s: float = 30.0
    """Longest recording, in seconds."""
    max_tokens: int = 448
    """Longest transcript, the tokens that name language and task counted."""
    languages: tuple[str, ...] = ()
    """Codes that its tokenizer has a token for; none where it knows one language only."""
    count_tokens: Callable[[Sequence[str]], list[int | str]] | None = field(default=None, compare=False, repr=False)
    """Transcripts -> the number of tokens of each, those that name language and task counted, or why it cannot be
    learnt."""
    find_language: Callable[[str], str | None] | None = field(default=None, compare=False, repr=False)
    """What a table calls a language, say English or en-US -> the code by which the base knows it, if it does."""


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
    """Set by the adapters package once an adapter is injected."""
    text_cache: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Prompt -> text embeddings, so that previews work after the text encoders are released."""

    def release(self, *names: str) -> None:
        """Forgets parts or modules that are not needed any more, so that their memory is freed."""
        for name in names:
            self.parts.pop(name, None)
            self.modules.pop(name, None)


@dataclass(frozen=True)
class ChatInfo(BaseInfo):
    """What is known of a base of visual question answering; it has no prediction."""

    resolution: int = 0
    size_step: int = 1
    architecture: str = ""
    prediction: str = ""
    source: str = ""
    max_tokens: int = 4096
    """Longest conversation, the tokens of the images counted."""
    count_tokens: Callable[[Sequence[Chat]], list[int | str]] | None = field(default=None, compare=False, repr=False)
    """Conversations -> the number of tokens of each, or why the chat template cannot render it."""
