"""Conversations about pictures, as a kind of samples."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.config.schema import ChatDataConfig, PreviewConfig
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import user_path
from lora_diffusion.core.logs import logger, name_some, shown
from lora_diffusion.core.types import Chat, ChatInfo, Request, Turn
from lora_diffusion.data import conversations, images
from lora_diffusion.data._progress import watch
from lora_diffusion.data.conversations import Conversation
from lora_diffusion.data.folder import Folder, list_folder, stop

_NUM_THREADS = 8
_NUM_AT_ONCE = 8
_NUM_PREVIEWS = 4
_SHORTEST_GROUP = 32
_SAVED_BY_DATASETS = "dataset_info.json"


@dataclass(frozen=True)
class ChatReport:
    """Facts about a data set of conversations, named by their key."""

    num_conversations: int
    num_shown: int
    """Conversations in an epoch, repeats counted."""
    num_pictures: int
    num_answers: int
    longest: tuple[str, int]
    """The longest conversation and its tokens, those of the picture counted."""
    num_tokens: int
    commonest_answers: tuple[tuple[str, int], ...]
    """The answers that are given most often."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""
        common = ", ".join(f'"{answer}" ({count})' for answer, count in self.commonest_answers)
        return [
            f"Conversations: {self.num_conversations} about {self.num_pictures} pictures, {self.num_shown} in an epoch",
            f"Answers:       {self.num_answers}, most often {common}",
            f"Tokens:        {self.num_tokens}, the longest has {self.longest[1]} ({self.longest[0]})",
        ]


class _Chats:
    """See `data.kinds.Kind` for what each method must do."""

    noun = "conversations"

    def read(self, config: ChatDataConfig, info: ChatInfo) -> list[Chat]:
        """Reads the files, or a data set that was saved to the disk, and decodes every picture once."""
        is_table = (user_path(config.path, "data.path") / _SAVED_BY_DATASETS).is_file()
        faults: list[str] = []
        folder, entries = (_list_saved if is_table else _list_files)(config, faults)
        checked = _check_pictures(entries, config, faults)
        unreadable = 0 if config.skip_bad else len(entries) - len(checked)
        samples = [_sample(entry, size) for entry, size in checked]
        samples = _count(samples, config, info, faults)
        stop(folder, "pictures", faults, unreadable)
        if not samples:
            raise DataError(f"data.path={config.path}: no conversation is left to train on.")
        logger.info("Read %d conversations with %d answers.", len(samples), sum(map(_num_answers, samples)))
        return samples

    def identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the picture by its bytes and the views of it, and what is said."""
        return [*self.view_identity(sample, config), _spelled(sample)]

    def view_identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the picture by its bytes, and the views of it."""
        return [hashlib.sha256(_content(sample)).hexdigest(), config.zooms]

    def text_identity(self, sample: Chat) -> list[Any]:
        """Names what is said, and the size of the picture, which decides how many tokens it takes."""
        return [_spelled(sample), sample.size]

    def open(self, sample: Chat, config: ChatDataConfig) -> Chat:
        """Decodes the picture at each zoom."""
        picture = images.open_rgb(sample.path, _content(sample))
        return replace(sample, views=tuple(_zoomed(picture, zoom) for zoom in config.zooms))

    def group(self, sample: Chat) -> str:
        """Names the length, rounded up by at most a half."""
        return sample.group

    def num_at_once(self, sample: Chat, config: ChatDataConfig) -> int:
        """Limits the views of all samples together."""
        del sample
        return max(_NUM_AT_ONCE // len(config.zooms), 1)

    def describe(self, samples: Sequence[Chat]) -> ChatReport:
        """Counts answers and tokens."""
        answers = Counter(turn.text for sample in samples for turn in sample.turns if turn.role == "assistant")
        longest = max(samples, key=lambda sample: sample.num_tokens)
        return ChatReport(
            num_conversations=len(samples),
            num_shown=sum(sample.num_repeats for sample in samples),
            num_pictures=len({sample.path for sample in samples}),
            num_answers=answers.total(),
            longest=(longest.key, longest.num_tokens),
            num_tokens=sum(sample.num_tokens for sample in samples),
            commonest_answers=tuple(answers.most_common(3)),
        )

    def largest(self, samples: Sequence[Chat]) -> tuple[int, int]:
        """Gives the tokens of the longest conversation, and the pictures of one."""
        return max(sample.num_tokens for sample in samples), 1

    def previews(self, samples: Sequence[Chat], config: PreviewConfig) -> list[Request]:
        """Asks about the first pictures: the prompts, or what the data asks first."""
        first = list({sample.path: sample for sample in reversed(samples)}.values())[::-1][:_NUM_PREVIEWS]
        opened = [self.open(sample, ChatDataConfig()) for sample in first]
        return [
            Request(prompt, seed, sample=sample)
            for sample in opened
            for prompt in map(conversations.bare, config.prompts or (_first_question(sample),))
            for seed in config.seeds
        ]

    def metadata(self, samples: Sequence[Chat], config: ChatDataConfig) -> dict[str, Any]:
        """Tells the number of answers and the views of a picture."""
        return {"num_answers": sum(map(_num_answers, samples)), "picture_zooms": config.zooms}

    def headline(self, samples: Sequence[Chat]) -> dict[str, Any]:
        """Gives nothing."""
        del samples
        return {}

    def texts(self, sample: Chat) -> tuple[str, ...]:
        """Gives none: what people wrote to each other is nobody else's business."""
        del sample
        return ()


@dataclass(frozen=True)
class _Entry:
    key: str
    conversation: Conversation
    path: Path
    read_bytes: Callable[[], bytes] | None = None


def _list_files(config: ChatDataConfig, faults: list[str]) -> tuple[Folder, list[_Entry]]:
    path = user_path(config.path, "data.path")
    if path.is_file() and path.suffix.lower() in conversations.ENDINGS:
        folder = Folder(path.parent, "files", (path,), ())
    else:
        folder = replace(list_folder(config.path, _Chats.noun, conversations.ENDINGS), noun="files")
    entries = []
    for file, conversation in conversations.read_files(folder, faults):
        picture = _find_picture(file, conversation, config, faults)
        if picture:
            entries.append(_Entry(conversation.origin, conversation, picture))
    return folder, entries


def _find_picture(file: Path, conversation: Conversation, config: ChatDataConfig, faults: list[str]) -> Path | None:
    name = conversation.image
    if not isinstance(name, str):
        faults.append(f'{conversation.origin}: names no picture; give it a key "image" with its file name.')
        return None
    root = user_path(config.images, "data.images") if config.images else file.parent
    path = root / name
    if os.path.isfile(path):  # noqa: PTH113 - that of pathlib raises where the name is too long
        return path
    remedy = (
        "correct the name" if config.images else "correct the name or set data.images to the folder of the pictures"
    )
    if name.startswith("data:"):
        remedy = "pictures inside the file are not read, so save each as a file and give its name"
    faults.append(f"{conversation.origin}: there is no picture {shown(name)} in {root}; {remedy}.")
    return None


def _list_saved(config: ChatDataConfig, faults: list[str]) -> tuple[Folder, list[_Entry]]:
    datasets = require("datasets", "Reading a data set that was saved to the disk")
    root = user_path(config.path, "data.path")
    table = datasets.load_from_disk(str(root))
    columns = getattr(table, "column_names", ())
    column = next((name for name in conversations.IMAGE_KEYS if name in columns), None)
    if column is None or not set(conversations.LIST_KEYS) & set(columns):
        raise DataError(
            f"data.path={config.path} is a saved data set without columns such as image and messages, or with several "
            "splits; give the folder of one split that holds conversations about pictures."
        )
    is_list = not isinstance(table.features[column], datasets.Image)
    feature = datasets.Image(decode=False)
    table = table.cast_column(column, datasets.List(feature) if is_list else feature)
    texts, entries = table.remove_columns(column), []
    for index in range(len(table)):
        conversation = conversations.parse(texts[index], f"row {index}", faults)
        if conversation:
            content = partial(_cell_content, table, index, column)
            entries.append(_Entry(conversation.origin, conversation, root / f"row {index}", content))
    return Folder(root, _Chats.noun, tuple(entry.path for entry in entries), ()), entries


def _cell_content(table: Any, index: int, column: str) -> bytes:
    cell = table[index][column]
    cell = cell[0] if isinstance(cell, list) else cell
    content: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    return content


def _check_pictures(
    entries: Sequence[_Entry], config: ChatDataConfig, faults: list[str]
) -> list[tuple[_Entry, tuple[int, int]]]:
    """Returns the entries whose pictures can be read, with their sizes; the others are faults or left out."""

    def measure(entry: _Entry) -> tuple[int, int] | str:
        try:
            return images.open_rgb(entry.path, entry.read_bytes() if entry.read_bytes else None).size
        except images.PictureError as error:
            return error.reason

    distinct = {entry.path: entry for entry in entries}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = list(watch(pool.map(measure, distinct.values()), len(distinct), "Checking pictures"))
    sizes = dict(zip(distinct, found, strict=True))
    bad = {path: reason for path, reason in sizes.items() if isinstance(reason, str)}
    good = [(entry, size) for entry in entries if not isinstance(size := sizes[entry.path], str)]
    if bad and config.skip_bad and good:
        names = [path.name for path in bad]
        logger.warning("Left out pictures that cannot be read: %d (%s).", len(bad), name_some(names))
    else:
        faults.extend(f"{distinct[path].key}: its picture {path.name} {reason}" for path, reason in bad.items())
    return good


def _sample(entry: _Entry, size: tuple[int, int]) -> Chat:
    return Chat(entry.key, entry.path, turns=entry.conversation.turns, size=size, read_bytes=entry.read_bytes)


def _count(samples: Sequence[Chat], config: ChatDataConfig, info: ChatInfo, faults: list[str]) -> list[Chat]:
    """Returns the samples with their numbers of tokens; those that are too long are faults or left out."""
    assert info.count_tokens is not None, "a base that talks counts tokens"
    most = min(config.max_tokens or info.max_tokens, info.max_tokens)
    counted, too_long = [], []
    for sample, count in zip(samples, info.count_tokens(samples), strict=True):
        if isinstance(count, str):
            faults.append(f"{sample.key}: {count}")
        elif count > most:
            too_long.append((sample.key, count))
        else:
            counted.append(replace(sample, num_tokens=count, group=_group(count)))
    if too_long and config.too_long == "skip":
        names = [key for key, _ in too_long]
        logger.warning("Left out conversations of more than %d tokens: %d (%s).", most, len(names), name_some(names))
    else:
        faults += [
            f"{key}: has {count} tokens, those of its picture counted, and at most {most} are allowed; shorten it, or "
            "set data.too_long=skip."
            for key, count in too_long
        ]
    return counted


def _group(num_tokens: int) -> str:
    return str(next(length for length in _lengths() if length >= num_tokens))


def _lengths() -> Iterator[int]:
    """Yields 32, 48, 64, 96, 128, 192, ..."""
    length = _SHORTEST_GROUP
    while True:
        yield length
        yield length + length // 2
        length *= 2


def _content(sample: Chat) -> bytes:
    return sample.read_bytes() if sample.read_bytes else sample.path.read_bytes()


def _spelled(sample: Chat) -> list[list[str]]:
    return [[turn.role, turn.text] for turn in sample.turns]


def _zoomed(picture: Image.Image, zoom: float) -> Image.Image:
    """Returns a picture of the same size that shows its middle larger, or all of it smaller with a white rim."""
    if zoom == 1:
        return picture
    width, height = picture.size
    size = (max(round(width * zoom), 1), max(round(height * zoom), 1))
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))
    return ground


def _num_answers(sample: Chat) -> int:
    return sum(turn.role == "assistant" for turn in sample.turns)


def _first_question(sample: Chat) -> str:
    return next(turn.text for turn in sample.turns if turn.role == "user")


def ask(path: Path, question: str, seed: int = 0) -> Request:
    """Returns a request to answer a question about a picture, which it may mark with "<image>" as training data does.

    Raises:
        PictureError: it cannot be read.
    """
    question = conversations.bare(question)
    sample = Chat(str(path), path, turns=(Turn("user", question),))
    return Request(question, seed, sample=replace(sample, views=(images.open_rgb(path),)))


def questions(samples: Sequence[Chat]) -> list[tuple[Request, str]]:
    """Returns the first question of each conversation as a request, and the answer that it should get."""
    opened: Mapping[Path, Chat] = {sample.path: sample for sample in samples}
    views = {path: KIND.open(sample, ChatDataConfig()).views for path, sample in opened.items()}
    pairs = []
    for sample in samples:
        asked, answer = [turn.text for turn in sample.turns if turn.role != "system"][:2]
        pairs.append((Request(asked, 0, sample=replace(sample, views=views[sample.path])), answer))
    return pairs


KIND = _Chats()
