"""Samples, from a user's files to batches, and what is asked of a model; no import of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


PIECES = frozenset({"views", "texts"})
"""What an item is prepared from, each by itself: the views of its image or recording, and its texts."""


AnchorPairs = tuple[tuple[str, str], ...]
"""Captions with the trigger, each with what the base reads in its place."""


@dataclass(frozen=True)
class Sample:
    """One training example as the user gave it."""

    key: str
    """Unique name within the data set: its path below `data.path`."""
    path: Path
    """The file that holds the image or the recording."""
    num_repeats: int = 1
    """How often an epoch shows the sample."""


@dataclass(frozen=True)
class ImageText(Sample):
    """An image and what it shows."""

    captions: tuple[str, ...] = ()
    """Rendered captions; one of them is drawn each time the image is used."""
    prior_captions: tuple[str, ...] = ()
    """What must not change its meaning: the caption without the trigger words, then with other words in their place.
    Empty where no trigger is known."""
    anchors: Callable[[str], AnchorPairs] | None = field(default=None, compare=False, repr=False)
    """Makes the captions that have something else beside the trigger, content or look. None where no trigger is
    known."""
    trigger: str = ""
    """The words that call up what is trained, the same in all samples of a data set; "" where none are known."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the bucket that the image is trained in."""
    original_size: tuple[int, int] = (0, 0)
    """Width and height in pixels of the image itself."""
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Pixels cut off at the left, top, right and bottom once the image is scaled to cover its bucket."""
    read_bytes: Callable[[], bytes] | None = None
    """Gives the content where it lies in a table; None reads `path`."""
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

    def language_and_task(self, options: Any) -> tuple[str, str]:
        """Returns those of the recording, or those of the model options."""
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
class Request:
    """One image to generate, or one text to write about a recording or an image."""

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
    """What to write about, opened by its sample type."""


@dataclass(frozen=True)
class Output:
    """What a family makes of a request: an image or a text."""

    request: Request
    image: Image = None  # type: ignore[assignment]  # families that draw always give one
    text: str = ""
    """What a family that writes has written."""


@dataclass(frozen=True)
class Turn:
    """What one side says in a conversation."""

    role: str
    """system, user or assistant."""
    text: str
    num_images: int = 0
    """Images that are shown before the text; only questions show any."""


@dataclass(frozen=True)
class ChatImage:
    """An image that a conversation is about."""

    path: Path
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    read_bytes: Callable[[], bytes] | None = None
    """Gives the content where it lies in a table; None reads `path`."""


@dataclass(frozen=True)
class Chat(Sample):
    """A conversation, about images or about none."""

    turns: tuple[Turn, ...] = ()
    """A system turn or none, then questions and answers in turn, an answer last."""
    images: tuple[ChatImage, ...] = ()
    """Those that the turns show, in their order."""
    num_tokens: int = 0
    """Of the whole conversation, those of the images counted."""
    group: str = ""
    """The same for conversations of about the same length."""
    views: tuple[tuple[Image, ...], ...] = ()
    """The images at each of `data.zooms`, those of one place all of one size; filled only while the sample is being
    prepared."""

    def first_question(self) -> Turn:
        """Returns the first turn of the user."""
        return next(turn for turn in self.turns if turn.role == "user")
