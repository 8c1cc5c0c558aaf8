"""Conversations about pictures: the layouts that they are written in, and what can be wrong with one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from lora_diffusion.core.files import parse_json
from lora_diffusion.core.samples import Turn
from lora_diffusion.core.text import shown
from lora_diffusion.data.folder import Folder, read_text

ENDINGS = (".json", ".jsonl")
IMAGE = "<image>"
"""Stands in a text where the picture is."""
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
class Conversation:
    """One entry of a file: what is said, and what it calls its picture."""

    origin: str
    """Where it is written, for messages."""
    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()
    """Paths as written, or what a table holds, in the order in which the turns show them."""


def read_files(folder: Folder, faults: list[str]) -> list[tuple[Path, Conversation]]:
    """Returns (file, conversation) of every entry of the files that is sound.

    Args:
        folder: JSON and JSONL files.
        faults: one line is added for each entry that is wrong.
    """
    found = []
    for file in folder.files:
        text = read_text(folder, file, faults)
        for origin, entry in _entries(folder.name(file), file, text, faults) if text is not None else ():
            conversation = parse(entry, origin, faults)
            if conversation:
                found.append((file, conversation))
    return found


def _entries(name: str, file: Path, text: str, faults: list[str]) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                place = f"{name}, line {number}"
                yield from ((place, entry) for entry in _parsed(place, line, faults))
        return
    for entries in _parsed(name, text, faults):
        listed = entries if isinstance(entries, list) else [entries]
        yield from ((f"{name}, entry {number}", entry) for number, entry in enumerate(listed, start=1))


def _parsed(place: str, text: str, faults: list[str]) -> list[Any]:
    try:
        return [parse_json(text)]
    except ValueError as error:
        faults.append(f"{place}: is not JSON that can be read ({error}); correct it.")
        return []


def parse(entry: Any, origin: str, faults: list[str], held: Sequence[Any] | None = None) -> Conversation | None:
    """Returns the conversation of an entry, or None and a fault.

    Args:
        entry: as JSON or a table gives it: {"image": ..., "conversations": [{"from": ..., "value": ...}]} or
            {"messages": [{"role": ..., "content": text or list of parts}]}.
        origin: where it is written.
        faults: a line is added if it cannot be used.
        held: pictures that a table holds, which count instead of names in the entry.
    """
    try:
        turns, images = _turns(entry)
        images = images if held is None else list(held)
        _check(turns)
        _check_marks(turns, images)
        return Conversation(origin, tuple(map(_without_marks, turns)), tuple(images))
    except ValueError as error:
        faults.append(f"{origin}: {error}")
        return None


def _turns(entry: Any) -> tuple[list[Turn], list[Any]]:
    if not isinstance(entry, Mapping):
        raise ValueError(f'is no object with one of {", ".join(LIST_KEYS)} and "image"; correct it.')
    listed = next((entry[key] for key in LIST_KEYS if isinstance(entry.get(key), Sequence)), None)
    if not listed or isinstance(listed, str):
        raise ValueError(f"has no list of turns; give it a key {', '.join(LIST_KEYS[:-1])} or {LIST_KEYS[-1]}.")
    told = [_turn(number, item) for number, item in enumerate(listed, start=1)]
    named = [image for _, images in told for image in images if image is not None]
    above = _listed(next((entry[key] for key in IMAGE_KEYS if entry.get(key)), None))
    images = above + [image for image in named if image not in above] if above else named
    return [turn for turn, _ in told], images


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _turn(number: int, item: Any) -> tuple[Turn, list[Any]]:
    """Returns a turn with "<image>" where a picture is, and the pictures that it names itself."""
    if not isinstance(item, Mapping):
        raise ValueError(f"turn {number} is no object with a role and a text.")
    told = next((item[key] for key in _ROLE_KEYS if isinstance(item.get(key), str)), None)
    if told not in _ROLES:
        raise ValueError(
            f"turn {number} is said by {shown(repr(told))}; use user and assistant (or human and gpt), or system."
        )
    content = next((item[key] for key in _TEXT_KEYS if item.get(key) is not None), "")
    if isinstance(content, str):
        return Turn(_ROLES[told], content), []
    if not isinstance(content, Sequence) or not all(isinstance(part, Mapping) for part in content):
        raise ValueError(f'turn {number} has content that is neither a text nor a list of parts with a "type".')
    unread = [part for part in content if part.get("type") != "image" and not isinstance(part.get("text"), str)]
    if unread:
        raise ValueError(
            f"turn {number} holds a part of type {shown(repr(unread[0].get('type')))} and without a text, which is not "
            'read; write a picture as {"type": "image", "path": "name.png"}.'
        )
    is_picture = [part.get("type") == "image" for part in content]
    texts = [IMAGE if picture else part["text"] for part, picture in zip(content, is_picture, strict=True)]
    images = [
        next((part[key] for key in ("image", "path", "url") if part.get(key)), None)
        for part, picture in zip(content, is_picture, strict=True)
        if picture
    ]
    return Turn(_ROLES[told], "\n".join(texts)), images


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
    empty = [n for n, turn in enumerate(spoken, start=first) if turn.role == "assistant" and not bare(turn.text)]
    if empty:
        raise ValueError(f"has an empty answer (turn {empty[0]}); write it.")


def _check_marks(turns: Sequence[Turn], images: Sequence[Any]) -> None:
    marks = sum(turn.text.count(IMAGE) for turn in turns)
    if images and not marks:
        raise ValueError(f"has no {IMAGE} in any turn; write it into the first question.")
    if marks and not images:
        raise ValueError(f'names no picture; give it a key "image" with its file name, or take {IMAGE} out.')
    if len(images) != marks:
        raise ValueError(
            f"has {marks} times {IMAGE} and names {len(images)} pictures; write {IMAGE} once for each picture."
        )
    wrong = [n for n, turn in enumerate(turns, start=1) if turn.role != "user" and IMAGE in turn.text]
    if wrong:
        role = turns[wrong[0] - 1].role
        raise ValueError(f"has {IMAGE} in turn {wrong[0]}, which is the {role}'s; only questions show pictures.")


def bare(text: str) -> str:
    """Returns a text without the marks of its pictures, which are shown before it anyway."""
    return text.replace(IMAGE, "").strip()


def _without_marks(turn: Turn) -> Turn:
    return Turn(turn.role, bare(turn.text), turn.text.count(IMAGE))
