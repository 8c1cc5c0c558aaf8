"""Conversations about pictures, or about none, as a kind of samples."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.config.schema import ChatDataConfig, PreviewConfig
from lora_diffusion.core.base_model import ChatInfo
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.files import user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import Chat, ChatImage, Request, Turn
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import conversations, images, rows, splits
from lora_diffusion.data.conversations import Conversation
from lora_diffusion.data.folder import Folder, list_folder, named_in, stop_or_leave_out
from lora_diffusion.runtime.progress import watch

_NUM_THREADS = 8
_NUM_AT_ONCE = 8
_NUM_PREVIEWS = 4
_SHORTEST_GROUP = 32


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
    num_without_picture: int = 0
    """Conversations that show none."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""
        common = ", ".join(f'"{answer}" ({count})' for answer, count in self.commonest_answers)
        without = f" ({self.num_without_picture} without a picture)" if self.num_without_picture else ""
        return [
            f"Conversations: {self.num_conversations} about {self.num_pictures} pictures{without}, {self.num_shown} in "
            "an epoch",
            f"Answers:       {self.num_answers}, most often {common}",
            f"Tokens:        {self.num_tokens}, the longest has {self.longest[1]} ({self.longest[0]})",
        ]


class _Chats:
    """See `data.kinds.Kind` for what each method must do."""

    noun = "conversations"

    def read(self, config: ChatDataConfig, info: ChatInfo) -> list[Chat]:
        """Reads the files, or a data set of rows, and decodes every picture once."""
        faults: list[str] = []
        folder, entries = (_list_rows if rows.are_rows(config.path) else _list_files)(config, faults)
        samples = _with_sizes(entries, faults)
        samples = _count(samples, config, info, faults)
        stop_or_leave_out(folder, "pictures", faults, len(samples), skip_bad=config.skip_bad)
        if not samples:
            raise DataError(f"data.path={config.path}: no conversation is left to train on.")
        logger.info("Read %d conversations with %d answers.", len(samples), sum(map(_num_answers, samples)))
        return samples

    def identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the pictures by their bytes and the views of them, and what is said."""
        said = [*self.view_identity(sample, config), _spelled(sample)]
        if _shows_one_at_first(sample):  # as older runs name it
            return said
        return [*said, [turn.num_images for turn in sample.turns]]

    def view_identity(self, sample: Chat, config: ChatDataConfig) -> list[Any]:
        """Names the pictures by their bytes, and the views of them."""
        digests = [hashlib.sha256(_content(image)).hexdigest() for image in sample.images]
        return [digests[0] if _shows_one_at_first(sample) else digests, config.zooms]

    def text_identity(self, sample: Chat) -> list[Any]:
        """Names what is said, and the sizes of the pictures, which decide how many tokens they take."""
        sizes = [image.size for image in sample.images]
        return [_spelled(sample), sizes, [turn.num_images for turn in sample.turns]]

    def open(self, sample: Chat, config: ChatDataConfig) -> Chat:
        """Decodes the pictures at each zoom."""
        pictures = [images.open_rgb(image.path, _content(image)) for image in sample.images]
        views = tuple(tuple(_zoomed(picture, zoom) for picture in pictures) for zoom in config.zooms)
        return replace(sample, views=views)

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
            num_pictures=len({image.path for sample in samples for image in sample.images}),
            num_answers=answers.total(),
            longest=(longest.key, longest.num_tokens),
            num_tokens=sum(sample.num_tokens for sample in samples),
            commonest_answers=tuple(answers.most_common(3)),
            num_without_picture=sum(not sample.images for sample in samples),
        )

    def largest(self, samples: Sequence[Chat]) -> tuple[int, int]:
        """Gives the tokens of the longest conversation, and the most pictures of one."""
        return max(sample.num_tokens for sample in samples), max(1, *(len(sample.images) for sample in samples))

    def previews(self, samples: Sequence[Chat], config: PreviewConfig) -> list[Request]:
        """Asks about the first pictures: the prompts, or what the data asks first."""
        about = [sample for sample in samples if sample.images] or samples
        first = list({sample.path: sample for sample in reversed(about)}.values())[::-1][:_NUM_PREVIEWS]
        opened = [self.open(sample, ChatDataConfig()) for sample in first]
        return [
            Request(prompt, seed, sample=sample)
            for sample in opened
            for prompt in map(conversations.bare, config.prompts or (sample.first_question().text,))
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


def _list_files(config: ChatDataConfig, faults: list[str]) -> tuple[Folder, list[Chat]]:
    path = user_path(config.path, "data.path")
    if path.is_file() and path.suffix.lower() in conversations.ENDINGS:
        folder = Folder(path.parent, "files", (path,), (), f"data.path={config.path}")
        splits.check_single(config.split, folder.given)
    else:
        listed = list_folder(config.path, _Chats.noun, conversations.ENDINGS)
        folder = splits.choose(replace(listed, noun="files"), config.split)
    entries = []
    for file, conversation in conversations.read_files(folder, faults):
        found = _find_pictures(file, conversation, config, faults)
        if found is not None:
            entries.append(_sample(conversation, found, file))
    return folder, entries


def _sample(conversation: Conversation, found: tuple[ChatImage, ...], file: Path) -> Chat:
    return Chat(conversation.origin, found[0].path if found else file, turns=conversation.turns, images=found)


def _find_pictures(
    file: Path, conversation: Conversation, config: ChatDataConfig, faults: list[str]
) -> tuple[ChatImage, ...] | None:
    """Returns the pictures of a conversation, or None and a fault."""
    unfit = [name for name in conversation.images if not isinstance(name, str)]
    if unfit:
        faults.append(f"{conversation.origin}: calls a picture {shown(repr(unfit[0]))}; give its file name.")
        return None
    root = user_path(config.images, "data.images") if config.images else file.parent
    paths = [named_in(root, name) for name in conversation.images]
    # os.path, since pathlib raises where the name is too long
    missing = [name for name, path in zip(conversation.images, paths, strict=True) if not os.path.isfile(path)]  # noqa: PTH113
    if not missing:
        return tuple(map(ChatImage, paths))
    remedy = (
        "correct the name" if config.images else "correct the name or set data.images to the folder of the pictures"
    )
    if missing[0].startswith("data:"):
        remedy = "pictures inside the file are not read, so save each as a file and give its name"
    more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
    faults.append(
        f"{conversation.origin}: there is no picture {shown(missing[0])}{more} in {root.absolute()}; {remedy}."
    )
    return None


def _list_rows(config: ChatDataConfig, faults: list[str]) -> tuple[Folder, list[Chat]]:
    table = rows.read(config.path, config.split, conversations.IMAGE_KEYS, "Image", "pictures")
    if not set(conversations.LIST_KEYS) & set(table.texts.column_names):
        keys = f"{', '.join(conversations.LIST_KEYS[:-1])} or {conversations.LIST_KEYS[-1]}"
        raise DataError(f"data.path={config.path}: the table has no column {keys}; what is said must stand in one.")
    entries = []
    for index, files in enumerate(table.files):
        origin = f"row {index}"
        conversation = conversations.parse(table.texts[index], origin, faults, files)
        if conversation:
            found = tuple(
                ChatImage(table.root / (origin if place == 0 else f"{origin}, picture {place}"), read_bytes=content)
                for place, content in enumerate(files)
            )
            entries.append(_sample(conversation, found, table.root / origin))
    given = f"data.path={config.path}"
    return Folder(table.root, _Chats.noun, tuple(entry.path for entry in entries), (), given), entries


def _with_sizes(entries: Sequence[Chat], faults: list[str]) -> list[Chat]:
    """Returns the samples whose pictures can be read, with the sizes of those; the others are faults."""

    def measure(image: ChatImage) -> tuple[int, int] | str:
        try:
            return images.measure(image.path, image.read_bytes() if image.read_bytes else None)
        except images.PictureError as error:
            return error.reason
        except OSError as error:  # of a table, which may name a file
            return f"cannot be read ({error.strerror}); correct the row."

    distinct = {image.path: image for entry in entries for image in entry.images}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = list(watch(pool.map(measure, distinct.values()), len(distinct), "Checking pictures"))
    sizes = dict(zip(distinct, found, strict=True))
    samples = []
    for entry in entries:
        bad = next((image.path for image in entry.images if isinstance(sizes[image.path], str)), None)
        if bad is None:
            sized = tuple(replace(image, size=sizes[image.path]) for image in entry.images)
            samples.append(replace(entry, images=sized))
        else:
            faults.append(f"{entry.key}: its picture {bad.name} {sizes[bad]}")
    return samples


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


def _content(image: ChatImage) -> bytes:
    return image.read_bytes() if image.read_bytes else image.path.read_bytes()


def _shows_one_at_first(sample: Chat) -> bool:
    """Says whether a conversation is about one picture, which its first question shows."""
    return len(sample.images) == sample.first_question().num_images == 1


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


def ask(path: Path, question: str, seed: int = 0) -> Request:
    """Returns a request to answer a question about a picture, which it may mark with "<image>" as training data does.

    Raises:
        PictureError: it cannot be read.
    """
    question, picture = conversations.bare(question), images.open_rgb(path)
    asked = Turn("user", question, 1)
    sample = Chat(str(path), path, turns=(asked,), images=(ChatImage(path, picture.size),), views=((picture,),))
    return Request(question, seed, sample=sample)


def questions(samples: Sequence[Chat]) -> list[tuple[Request, str]]:
    """Returns the first question of each conversation as a request, and the answer that it should get."""
    opened: Mapping[tuple[Path, ...], Chat] = {_pictures(sample): sample for sample in samples}
    views = {paths: KIND.open(sample, ChatDataConfig()).views for paths, sample in opened.items()}
    pairs = []
    for sample in samples:
        asked, answer = [turn.text for turn in sample.turns if turn.role != "system"][:2]
        pairs.append((Request(asked, 0, sample=replace(sample, views=views[_pictures(sample)])), answer))
    return pairs


def _pictures(sample: Chat) -> tuple[Path, ...]:
    return tuple(image.path for image in sample.images)


KIND = _Chats()
