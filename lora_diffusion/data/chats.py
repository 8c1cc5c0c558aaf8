"""Conversations about images, or about none: the layouts that they are written in, and what can be wrong with one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.config.schema import ChatDataConfig
from lora_diffusion.core.base_model import ChatInfo
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.files import parse_json, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import Chat, ChatImage, Request, Turn
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import images, sources
from lora_diffusion.data.folder import Folder, content_bytes, list_folder, named_in, read_text, stop_or_leave_out
from lora_diffusion.runtime.progress import watch

_NUM_THREADS = 8
_SHORTEST_GROUP = 32
ENDINGS = (".json", ".jsonl")
IMAGE = "<image>"
"""Stands in a text where the image is."""
LIST_KEYS = ("conversations", "messages", "conversation")
IMAGE_KEYS = ("image", "images", "image_path", "file_name")
_ROLE_KEYS = ("from", "role")
_TEXT_KEYS = ("value", "content", "text")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class ChatReport:
    """Facts about a data set of conversations, named by their key."""

    num_conversations: int
    num_shown: int
    """Conversations in an epoch, repeats counted."""
    num_pictures: int
    num_answers: int
    longest: tuple[str, int]
    """The longest conversation and its tokens, those of the image counted."""
    num_tokens: int
    commonest_answers: tuple[tuple[str, int], ...]
    """The answers that are given most often."""
    num_without_picture: int = 0
    """Conversations that show none."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""
        common = ", ".join(f'"{answer}" ({count})' for answer, count in self.commonest_answers)
        without = f" ({self.num_without_picture} without an image)" if self.num_without_picture else ""
        return [
            f"Conversations: {self.num_conversations} about {self.num_pictures} images{without}, {self.num_shown} in "
            "an epoch",
            f"Answers:       {self.num_answers}, most often {common}",
            f"Tokens:        {self.num_tokens}, the longest has {self.longest[1]} ({self.longest[0]})",
        ]


def read(config: ChatDataConfig, info: ChatInfo) -> list[Chat]:
    """Returns the conversations of files, or of a data set of rows; decodes every image once.

    Raises:
        DataError: the data cannot be used; all errors are listed at once.
    """
    errors: list[str] = []
    folder, entries = (_list_rows if sources.are_rows(config.path) else _list_files)(config, errors)
    samples = _with_sizes(entries, errors)
    samples = _count(samples, config, info, errors)
    stop_or_leave_out(folder, "images", errors, len(samples), skip_bad=config.skip_bad)
    if not samples:
        raise DataError(f"data.path={config.path}: no conversation is left to train on.")
    logger.info("Read %d conversations with %d answers.", len(samples), sum(map(num_answers, samples)))
    return samples


def open_sample(sample: Chat, config: ChatDataConfig) -> Chat:
    """Returns the sample with its images decoded at each zoom."""
    opened = [images.open_rgb(image.path, content_bytes(image)) for image in sample.images]
    return replace(sample, views=tuple(tuple(_zoomed(image, zoom) for image in opened) for zoom in config.zooms))


def describe(samples: Sequence[Chat]) -> ChatReport:
    """Returns the facts of samples that `read` returned."""
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


def _list_files(config: ChatDataConfig, errors: list[str]) -> tuple[Folder, list[Chat]]:
    path = user_path(config.path, "data.path")
    if path.is_file() and path.suffix.lower() in ENDINGS:
        folder = Folder(path.parent, "files", (path,), (), f"data.path={config.path}")
        sources.check_single_split(config.split, folder.given)
    else:
        listed = list_folder(config.path, "conversations", ENDINGS)
        folder = sources.choose_split(replace(listed, noun="files"), config.split)
    entries = []
    for file, conversation in read_files(folder, errors):
        chat_images = _find_images(file, conversation, config, errors)
        if chat_images is not None:
            entries.append(_sample(conversation, chat_images, file))
    return folder, entries


def _sample(conversation: Conversation, chat_images: tuple[ChatImage, ...], file: Path) -> Chat:
    path = chat_images[0].path if chat_images else file
    return Chat(conversation.origin, path, turns=conversation.turns, images=chat_images)


def _find_images(
    file: Path, conversation: Conversation, config: ChatDataConfig, errors: list[str]
) -> tuple[ChatImage, ...] | None:
    """Returns the images of a conversation, or None and an error."""
    unfit = [name for name in conversation.images if not isinstance(name, str)]
    if unfit:
        errors.append(f"{conversation.origin}: calls an image {shown(repr(unfit[0]))}; give its file name.")
        return None
    root = user_path(config.images, "data.images") if config.images else file.parent
    paths = [named_in(root, name) for name in conversation.images]
    # os.path, since pathlib raises where the name is too long
    missing = [name for name, path in zip(conversation.images, paths, strict=True) if not os.path.isfile(path)]  # noqa: PTH113
    if not missing:
        return tuple(map(ChatImage, paths))
    remedy = "correct the name" if config.images else "correct the name or set data.images to the folder of the images"
    if missing[0].startswith("data:"):
        remedy = "images inside the file are not read, so save each as a file and give its name"
    more = f" (and {len(missing) - 1} more)" if missing[1:] else ""
    errors.append(f"{conversation.origin}: there is no image {shown(missing[0])}{more} in {root.absolute()}; {remedy}.")
    return None


def _list_rows(config: ChatDataConfig, errors: list[str]) -> tuple[Folder, list[Chat]]:
    table = sources.read_rows(config.path, config.split, IMAGE_KEYS, "Image", "images")
    if not set(LIST_KEYS) & set(table.texts.column_names):
        keys = f"{', '.join(LIST_KEYS[:-1])} or {LIST_KEYS[-1]}"
        raise DataError(f"data.path={config.path}: the table has no column {keys}; what is said must stand in one.")
    entries = []
    for index, files in enumerate(table.files):
        origin = f"row {index}"
        conversation = parse(table.texts[index], origin, errors, files)
        if conversation:
            chat_images = tuple(
                ChatImage(table.root / (origin if place == 0 else f"{origin}, image {place}"), read_bytes=content)
                for place, content in enumerate(files)
            )
            entries.append(_sample(conversation, chat_images, table.root / origin))
    given = f"data.path={config.path}"
    return Folder(table.root, "conversations", tuple(entry.path for entry in entries), (), given), entries


def _with_sizes(entries: Sequence[Chat], errors: list[str]) -> list[Chat]:
    """Returns the samples whose images can be read, with the sizes of those; the others are errors."""

    def sized(image: ChatImage) -> ChatImage | str:
        try:
            return replace(image, size=images.measure(image.path, image.read_bytes and image.read_bytes()))
        except images.ImageError as error:
            return error.reason
        except OSError as error:  # of a table, which may name a file
            return f"cannot be read ({error.strerror}); correct the row."

    distinct = {image.path: image for entry in entries for image in entry.images}
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        measured = list(watch(pool.map(sized, distinct.values()), len(distinct), "Checking images"))
    results = dict(zip(distinct, measured, strict=True))
    samples = []
    for entry in entries:
        shown_images = []
        for image in entry.images:
            result = results[image.path]
            if isinstance(result, str):
                errors.append(f"{entry.key}: its image {image.path.name} {result}")
                break
            shown_images.append(result)
        else:
            samples.append(replace(entry, images=tuple(shown_images)))
    return samples


def _count(samples: Sequence[Chat], config: ChatDataConfig, info: ChatInfo, errors: list[str]) -> list[Chat]:
    """Returns the samples with their numbers of tokens; those that are too long are errors or left out."""
    assert info.count_tokens is not None, "a base that talks counts tokens"
    most = min(config.max_tokens or info.max_tokens, info.max_tokens)
    counted, too_long = [], []
    for sample, count in zip(samples, info.count_tokens(samples), strict=True):
        if isinstance(count, str):
            errors.append(f"{sample.key}: {count}")
        elif count > most:
            too_long.append((sample.key, count))
        else:
            counted.append(replace(sample, num_tokens=count, group=_group(count)))
    if too_long and config.too_long == "skip":
        names = [key for key, _ in too_long]
        logger.warning("Left out conversations of more than %d tokens: %d (%s).", most, len(names), name_some(names))
    else:
        errors += [
            f"{key}: has {count} tokens, those of its image counted, and at most {most} are allowed; shorten it, or "
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


def shows_one_at_first(sample: Chat) -> bool:
    """Says whether a conversation is about one image, which its first question shows."""
    return len(sample.images) == sample.first_question().num_images == 1


def roles_and_texts(sample: Chat) -> list[list[str]]:
    """Returns role and text of each turn."""
    return [[turn.role, turn.text] for turn in sample.turns]


def _zoomed(image: Image.Image, zoom: float) -> Image.Image:
    """Returns an image of the same size that shows its middle larger, or all of it smaller with a white rim."""
    if zoom == 1:
        return image
    width, height = image.size
    size = (max(round(width * zoom), 1), max(round(height * zoom), 1))
    scaled = image.resize(size, Image.Resampling.BICUBIC)
    ground = Image.new("RGB", image.size, "white")
    ground.paste(scaled, ((width - scaled.width) // 2, (height - scaled.height) // 2))
    return ground


def num_answers(sample: Chat) -> int:
    """Returns how many turns are the assistant's."""
    return sum(turn.role == "assistant" for turn in sample.turns)


def ask(path: Path, question: str, seed: int = 0) -> Request:
    """Returns a request to answer a question about an image, which it may mark with "<image>" as training data does.

    Raises:
        ImageError: it cannot be read.
    """
    question, image = without_marks(question), images.open_rgb(path)
    turn = Turn("user", question, 1)
    sample = Chat(str(path), path, turns=(turn,), images=(ChatImage(path, image.size),), views=((image,),))
    return Request(question, seed, sample=sample)


def questions(samples: Sequence[Chat]) -> list[tuple[Request, str]]:
    """Returns the first question of each conversation as a request, and the answer that it should get."""
    opened: Mapping[tuple[Path, ...], Chat] = {_image_paths(sample): sample for sample in samples}
    views = {paths: open_sample(sample, ChatDataConfig()).views for paths, sample in opened.items()}
    pairs = []
    for sample in samples:
        question, answer = [turn.text for turn in sample.turns if turn.role != "system"][:2]
        pairs.append((Request(question, 0, sample=replace(sample, views=views[_image_paths(sample)])), answer))
    return pairs


def _image_paths(sample: Chat) -> tuple[Path, ...]:
    return tuple(image.path for image in sample.images)


@dataclass(frozen=True)
class Conversation:
    """One entry of a file: what is said, and what it calls its image."""

    origin: str
    """Where it is written, for messages."""
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    """Paths as written, or what a table holds, in the order in which the turns show them."""


def read_files(folder: Folder, errors: list[str]) -> list[tuple[Path, Conversation]]:
    """Returns (file, conversation) of every entry of the files that is sound.

    Args:
        folder: JSON and JSONL files.
        errors: one line is added for each entry that is wrong.
    """
    conversations = []
    for file in folder.files:
        text = read_text(folder, file, errors)
        for origin, entry in _entries(folder.name(file), file, text, errors) if text is not None else ():
            conversation = parse(entry, origin, errors)
            if conversation:
                conversations.append((file, conversation))
    return conversations


def _entries(name: str, file: Path, text: str, errors: list[str]) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"{name}, line {number}"
                yield from ((place, entry) for entry in _parsed(place, line, errors))
        return
    for entries in _parsed(name, text, errors):
        listed = entries if isinstance(entries, list) else [entries]
        yield from ((f"{name}, entry {number}", entry) for number, entry in enumerate(listed, start=1))


def _parsed(place: str, text: str, errors: list[str]) -> list[Any]:
    try:
        return [parse_json(text)]
    except ValueError as error:
        errors.append(f"{place}: is not JSON that can be read ({error}); correct it.")
        return []


def parse(entry: Any, origin: str, errors: list[str], held: Sequence[Any] | None = None) -> Conversation | None:
    """Returns the conversation of an entry, or None and an error.

    Args:
        entry: as JSON or a table gives it: {"image": ..., "conversations": [{"from": ..., "value": ...}]} or
            {"messages": [{"role": ..., "content": text or list of parts}]}.
        origin: where it is written.
        errors: a line is added if it cannot be used.
        held: images that a table holds, which count instead of names in the entry.
    """
    try:
        turns, images = _turns(entry)
        images = images if held is None else list(held)
        _check(turns)
        _check_marks(turns, images)
        return Conversation(origin, tuple(map(_turn_without_marks, turns)), tuple(images))
    except ValueError as error:
        errors.append(f"{origin}: {error}")
        return None


def _turns(entry: Any) -> tuple[list[Turn], list[Any]]:
    if not isinstance(entry, Mapping):
        raise ValueError(f'is no object with one of {", ".join(LIST_KEYS)} and "image"; correct it.')
    listed = next((entry[key] for key in LIST_KEYS if isinstance(entry.get(key), Sequence)), None)
    if not listed or isinstance(listed, str):
        raise ValueError(f"has no list of turns; give it a key {', '.join(LIST_KEYS[:-1])} or {LIST_KEYS[-1]}.")
    pairs = [_turn(number, item) for number, item in enumerate(listed, start=1)]
    named = [image for _, images in pairs for image in images if image is not None]
    above = _listed(next((entry[key] for key in IMAGE_KEYS if entry.get(key)), None))
    images = above + [image for image in named if image not in above] if above else named
    return [turn for turn, _ in pairs], images


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _turn(number: int, item: Any) -> tuple[Turn, list[Any]]:
    """Returns a turn with "<image>" where an image is, and the images that it names itself."""
    if not isinstance(item, Mapping):
        raise ValueError(f"turn {number} is no object with a role and a text.")
    role = next((item[key] for key in _ROLE_KEYS if isinstance(item.get(key), str)), None)
    if role not in _ROLES:
        raise ValueError(
            f"turn {number} is said by {shown(repr(role))}; use user and assistant (or human and gpt), or system."
        )
    content = next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), "")
    if isinstance(content, str):
        return Turn(_ROLES[role], content), []
    parts: list[Any] = list(content) if isinstance(content, Sequence) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f'turn {number} has content that is neither a text nor a list of parts with a "type".')
    unread = [part for part in parts if part.get("type") != "image" and not isinstance(part.get("text"), str)]
    if unread:
        raise ValueError(
            f"turn {number} holds a part of type {shown(repr(unread[0].get('type')))} and without a text, which is not "
            'read; write an image as {"type": "image", "path": "name.png"}.'
        )
    is_image = [part.get("type") == "image" for part in parts]
    texts = [IMAGE if image else part["text"] for part, image in zip(parts, is_image, strict=True)]
    images = [
        next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
        for part, image in zip(parts, is_image, strict=True)
        if image
    ]
    return Turn(_ROLES[role], "\n".join(texts)), images


def _check(turns: Sequence[Turn]) -> None:
    spoken = [turn for turn in turns if turn.role != "system"]
    first = len(turns) - len(spoken) + 1
    if any(turn.role == "system" for turn in turns[1:]):
        raise ValueError("has a system turn that is not the first; move it to the beginning.")
    for number, (turn, wanted) in enumerate(zip(spoken, cycle(("user", "assistant")), strict=False), start=first):
        if turn.role != wanted:
            raise ValueError(
                f"turn {number} is the {turn.role}'s, where the {wanted}'s is due: question and answer must take turns."
            )
    if not spoken or spoken[-1].role != "assistant":
        raise ValueError("ends without an answer; add what the assistant should say.")
    empty = [
        n for n, turn in enumerate(spoken, start=first) if turn.role == "assistant" and not without_marks(turn.text)
    ]
    if empty:
        raise ValueError(f"has an empty answer (turn {empty[0]}); write it.")


def _check_marks(turns: Sequence[Turn], images: Sequence[Any]) -> None:
    marks = sum(turn.text.count(IMAGE) for turn in turns)
    if images and not marks:
        raise ValueError(f"has no {IMAGE} in any turn; write it into the first question.")
    if marks and not images:
        raise ValueError(f'names no image; give it a key "image" with its file name, or take {IMAGE} out.')
    if len(images) != marks:
        raise ValueError(
            f"has {marks} times {IMAGE} and names {len(images)} images; write {IMAGE} once for each image."
        )
    wrong = [n for n, turn in enumerate(turns, start=1) if turn.role != "user" and IMAGE in turn.text]
    if wrong:
        role = turns[wrong[0] - 1].role
        raise ValueError(f"has {IMAGE} in turn {wrong[0]}, which is the {role}'s; only questions show images.")


def without_marks(text: str) -> str:
    """Returns a text without the marks of its images, which are shown before it anyway."""
    return text.replace(IMAGE, "").strip()


def _turn_without_marks(turn: Turn) -> Turn:
    return Turn(turn.role, without_marks(turn.text), turn.text.count(IMAGE))
