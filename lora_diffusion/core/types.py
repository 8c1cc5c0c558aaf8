"""The records that the rooms hand to each other. Importing this file does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.adapter_state import AdapterState as AdapterState
from lora_diffusion.core.adapter_state import ModuleAdapter as ModuleAdapter
from lora_diffusion.core.adapter_state import ModuleKey as ModuleKey

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from lora_diffusion.core.clip_text import TextLimit
    from lora_diffusion.core.protocols import AdapterSwitch


PIECES = frozenset({"views", "texts"})
"""What an item is prepared from, each by itself: the views of its picture or recording, and its texts."""


@dataclass(frozen=True)
class Sample:
    """One training example as the user gave it."""

    key: str
    """Unique name within the data set: its path below `data.path`."""
    path: Path
    """The file that holds the picture or the recording."""
    num_repeats: int = 1
    """How often an epoch shows the sample."""


@dataclass(frozen=True)
class ImageText(Sample):
    """A picture and what it shows."""

    captions: tuple[str, ...] = ()
    """Rendered captions; one of them is drawn each time the picture is used."""
    prior_captions: tuple[str, ...] = ()
    """What must not change its meaning: the caption without the trigger words, then with other words in their place.
    Empty where no trigger is known."""
    trigger: str = ""
    """The words that call up what is trained, the same in all samples of a data set; "" where none are known."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the bucket that the picture is trained in."""
    original_size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the picture itself."""
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels cut off at the left, top, right and bottom once the picture is scaled to cover its bucket."""
    pixels: Tensor | None = None
    """[views, 3, height, width] in -1..1, float32; set only while the sample is being prepared. One view, or two with
    `data.flip`."""


@dataclass(frozen=True)
class AudioText(Sample):
    """A recording and what is said in it."""

    transcript: str = ""
    """What is said; may hold Whisper's timestamps, such as <|0.00|>."""
    language: str | None = None
    """Code such as en; None takes that of the model options."""
    task: str | None = None
    """transcribe or translate; None takes that of the model options."""
    start_s: float = 0.0
    """Where in the file the sample begins, in seconds."""
    duration_s: float = 0.0
    """How long it is, in seconds."""
    num_tokens: int = 0
    """Of the transcript, with those that name language and task."""
    sampling_rate: int = 16000
    """In Hz, of what the base hears."""
    read_bytes: Callable[[], bytes] | None = None
    """Gives the content of the sound file where it lies in a table; None reads `path`."""
    waveforms: tuple[Tensor, ...] = ()
    """The views of the sound, each [num_samples] in -1..1, float32, one channel at `sampling_rate`; filled only
    while the sample is being prepared. One view for each of `data.speeds`, clean and with each of `data.noise_db`."""

    def asked(self, options: Any) -> tuple[str, str]:
        """Returns language and task: its own, or those of the model options."""
        return self.language or options.language, self.task or options.task


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
    weights: Tensor | None = None
    """[batch], float32, how much each sample counts in the mean over a step; None if all count alike."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.keys)


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
class SampleLoss:
    """How well a trained adapter predicts one training picture."""

    key: str
    path: str
    caption: str
    loss: float
    """As a share of the usual loss at the same noise levels: 1 is the usual picture."""
    caption_help: float
    """How much lower the loss is with the caption than without any, in the same unit; below 0 the caption harms."""


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
    """What is known of a base that listens; it has no resolution, size_step and prediction."""

    resolution: int = 0
    size_step: int = 1
    architecture: str = ""
    prediction: str = ""
    source: str = ""
    sampling_rate: int = 16000
    """In Hz."""
    max_duration_s: float = 30.0
    """What it hears at once, in seconds."""
    max_tokens: int = 448
    """What it writes at once, the tokens that name language and task counted."""
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
    """Set by the adapters room once an adapter is injected."""
    text_cache: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    """Prompt -> text embeddings, so that previews work after the text encoders are released."""

    def release(self, *names: str) -> None:
        """Forgets parts or modules that are not needed any more, so that their memory is freed."""
        for name in names:
            self.parts.pop(name, None)
            self.modules.pop(name, None)


@dataclass(frozen=True)
class Request:
    """One picture to generate, or one text to write about a recording or a picture."""

    prompt: str
    seed: int
    negative: str = ""
    num_steps: int = 25
    guidance: float | None = None
    """Classifier-free guidance scale, 1 turns it off; None takes what suits the base."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None takes the base's own resolution."""
    weights: Mapping[str, float] | None = None
    """Adapter name -> weight; None leaves the adapters as they are."""
    sample: Sample | None = field(default=None, compare=False, repr=False)
    """What to write about, opened by its kind."""


@dataclass(frozen=True)
class Output:
    """What a family makes of a request: a picture or a text."""

    request: Request
    image: Image = None  # type: ignore[assignment]  # families that draw always give one
    text: str = ""
    """What a family that writes has written."""


@dataclass(frozen=True)
class Evidence:
    """What a metric judges: pictures of one candidate, or the answers of a model that writes.

    `pictures`, `meanings`, `cases` and `base_pictures` run in step, and so do `answers` and `targets`.
    """

    pictures: Sequence[Path | Image] = ()
    meanings: Sequence[str] = ()
    """What each picture should show, in words that the scorer knows."""
    cases: Sequence[int] = ()
    """Number of each picture's prompt."""
    base_pictures: Sequence[Path | Image] = ()
    """What the base alone drew for the same prompt from the same noise."""
    references: Sequence[Path | Image] = ()
    """Real pictures of what was trained, other than those it was trained on."""
    training_pictures: Sequence[Path | Image] = ()
    answers: Sequence[str] = ()
    """What the model said or heard."""
    targets: Sequence[str] = ()
    """What it should have."""
    scorers: Any = None
    """The models that score: `evaluation.scorers.Scorers`."""


@dataclass(frozen=True)
class Scores:
    """What a metric finds."""

    values: Tensor
    """Float32 on the CPU: one for each picture or answer, or for each prompt if the metric is `per_prompt`."""
    details: Sequence[str] = ()
    """What there is to say of each value; none if there is nothing."""
    weights: Tensor | None = None
    """What each value counts in the mean; None if all count alike."""

    def mean(self) -> float:
        """Returns the weighted mean."""
        if self.weights is None:
            return self.values.mean().item()
        return ((self.values * self.weights).sum() / self.weights.sum()).item()
