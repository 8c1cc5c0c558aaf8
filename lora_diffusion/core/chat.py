"""Conversations, about images or about none, and the bases that hold them; no import of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.types import BaseInfo, Sample

if TYPE_CHECKING:
    from PIL.Image import Image


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


@dataclass(frozen=True)
class ChatInfo(BaseInfo):
    """What is known of a base that talks about pictures; it has no prediction."""

    resolution: int = 0
    size_step: int = 1
    architecture: str = ""
    prediction: str = ""
    source: str = ""
    max_tokens: int = 4096
    """What it reads and writes at once, the tokens of the picture counted."""
    count_tokens: Callable[[Sequence[Chat]], list[int | str]] | None = field(default=None, compare=False, repr=False)
    """Conversations -> the number of tokens of each, or why the chat template cannot render it."""
