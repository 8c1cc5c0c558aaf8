"""Captions: where they are written, and the trigger words in them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.data.folder import Folder, parse_json, read_text

ENDINGS = (".txt", ".caption")
METADATA_NAME = "metadata.jsonl"
_TEXT_KEYS = ("text", "caption")
_LARGEST_BYTES = 2**16
"""Of a caption file; text encoders read some hundred characters of a caption."""

_LINKING_WORDS = (
    "a an the of in on at by to from with without and or as for into over under near is are was its his her their "
    "this that it"
)
_MEDIA_WORDS = "picture pictures photo photograph image emoji icon sticker drawing painting illustration portrait s t"
_LINKING = frozenset(_LINKING_WORDS.split())
_SAY_NOTHING = _LINKING | frozenset(_MEDIA_WORDS.split())
_WEAK = frozenset({"style"})
"""Part of a trigger ("blob style"), but none by itself."""

_THINGS = """
    airplane anchor balloon banana basket bear bed bell bicycle bird boat book bottle box bread bridge broom brush
    bus butterfly button cactus cake camera candle car carrot castle chair cheese church city clock cloud coin crown
    cup desk dog door dragon drum fan fire fish flag flower forest gift girl glass grapes guitar hammer hand hat
    heart horse house kettle key king kite knife ladder lamp leaf lemon lion man map mirror monkey moon mountain mouse
    mushroom needle notebook pencil piano pig pizza planet rabbit rainbow ring river road robot rocket rope scissors
    sea sheep shell shoe snake snow soldier spoon star sun sword table teacher telephone tent tiger tower train tree
    truck trumpet violin wheel window woman
"""
"""What pictures show, as any text encoder knows it."""
_FEWEST_OTHERS, _OTHERS_IN_ALL = 4, 64
"""Of each caption, and of all together where there are few."""

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana and Chinese characters, by the blocks of Unicode."""
_CUT = "\0"
_LINK = rf"(?:{'|'.join(sorted(_LINKING))})\b"
_DANGLING_BEFORE = re.compile(rf"(?:\b{_LINK}\s+|{_CUT}\s*)*{_CUT}(?=\s*(?:[,.;:]|$|{_LINK}))", re.IGNORECASE)
_DANGLING_AFTER = re.compile(rf"(^|[,.;:])\s*{_CUT}\s*(?:of|and|or)\b", re.IGNORECASE)

Lines = tuple[str, ...]


def collect(folder: Folder, faults: list[str]) -> dict[Path, Lines | None]:
    """Returns the captions of each picture that has a caption file or a line in a metadata.jsonl.

    An empty tuple stands for an empty caption, None for a file that cannot be read.

    Args:
        folder: the files.
        faults: one line is added for each thing that is wrong.
    """
    found: dict[Path, Lines | None] = {}
    origins: dict[Path, str] = {}
    for file in folder.others:
        if file.name == METADATA_NAME:
            captioned = _read_metadata(folder, file, faults)
        elif file.suffix.lower() in ENDINGS:
            captioned = _read_beside(folder, file, faults)
        else:
            continue
        for picture, lines in captioned.items():
            if found.get(picture, lines) != lines and None not in (lines, found[picture]):
                faults.append(
                    f"{folder.name(picture)}: {origins[picture]} and {folder.name(file)} give it different captions; "
                    "keep one of them."
                )
            found[picture], origins[picture] = lines, folder.name(file)
    return found


def _read_beside(folder: Folder, file: Path, faults: list[str]) -> dict[Path, Lines | None]:
    pictures = folder.beside(file)
    if not pictures:
        return {}
    text = read_text(folder, file, faults, _LARGEST_BYTES)
    lines = None if text is None else tuple(filter(None, map(_tidy_space, text.splitlines())))
    return dict.fromkeys(pictures, lines)


def _read_metadata(folder: Folder, file: Path, faults: list[str]) -> dict[Path, Lines | None]:
    found: dict[Path, Lines | None] = {}
    for number, line in enumerate((read_text(folder, file, faults) or "").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{folder.name(file)}, line {number}"
        try:
            name, texts = _parse_entry(line)
        except ValueError as error:
            faults.append(f"{place}: {error}")
            continue
        picture = folder.find(file.parent / name)
        if picture is None:
            faults.append(f"{place}: there is no picture {name}; correct file_name or remove the line.")
            continue
        found[picture] = (found.get(picture) or ()) + texts
    return found


def _parse_entry(line: str) -> tuple[str, Lines]:
    try:
        entry = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at character {error.pos + 1}); correct the line.") from error
    except RecursionError as error:
        raise ValueError("holds brackets in brackets too deep to be read; correct the line.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError('has no "file_name"; write {"file_name": "cat.png", "text": "a cat"}.')
    value = next((entry[key] for key in _TEXT_KEYS if key in entry), None)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('has no "text" or "caption" that is a string or a list of strings; add one.')
    return entry["file_name"], tuple(filter(None, map(_tidy_space, texts)))


def _tidy_space(text: str) -> str:
    return " ".join(text.split())


def find_trigger(captions: Sequence[str]) -> str:
    """Returns the words that all captions share, as the first one spells them, or "" if there are none.

    Words that say nothing by themselves (a, of, in, picture, emoji, ...) do not count. Words that stand together in
    every caption are returned as that phrase. Empty captions are left out; fewer than two give no trigger.

    >>> find_trigger(["an emoji of a cat, blob style", "a blob style dog"])
    'blob style'
    """
    texts = [caption for caption in captions if caption.strip()]
    if len(texts) < 2:
        return ""
    shared = set.intersection(*({word.lower() for word in _WORD.findall(text)} for text in texts))
    shared -= _SAY_NOTHING
    if shared <= _WEAK:
        return ""
    matches = [match for match in _WORD.finditer(texts[0]) if match[0].lower() in shared]
    phrase = texts[0][matches[0].start() : matches[-1].end()]
    if all(map(phrase_pattern(phrase).search, texts)):
        return phrase
    first_spelling: dict[str, str] = {}
    for match in matches:
        first_spelling.setdefault(match[0].lower(), match[0])
    return " ".join(first_spelling.values())


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Returns a pattern for a fixed phrase: whole words, any case, any white space between them."""
    words = r"\s+".join(map(re.escape, phrase.split()))
    return _whole(words, phrase[:1], phrase[-1:])


def words_pattern(trigger: str) -> re.Pattern[str]:
    """Returns a pattern for each telling word of a trigger that `find_trigger` found, wherever it stands."""
    words = [word for word in _WORD.findall(trigger) if word.lower() not in _SAY_NOTHING]
    return re.compile("|".join(_whole(re.escape(word), word[0], word[-1]).pattern for word in words), re.IGNORECASE)


def _whole(pattern: str, first: str, last: str) -> re.Pattern[str]:
    """Wants no letter beside the pattern, except where its end is of a script that sets no spaces between words."""
    before, after = "" if _UNSPACED.match(first) else r"(?<![^\W_])", "" if _UNSPACED.match(last) else r"(?![^\W_])"
    return re.compile(f"{before}{pattern}{after}", re.IGNORECASE)


def without_trigger(caption: str, trigger: re.Pattern[str]) -> str:
    """Returns the caption without the trigger, and without the commas and linking words that only led to it.

    >>> without_trigger("an emoji of a cat, in blob style", phrase_pattern("blob style"))
    'an emoji of a cat'
    """
    text = trigger.sub(_CUT, caption)
    text = _DANGLING_BEFORE.sub(_CUT, text)
    text = _DANGLING_AFTER.sub(rf"\1{_CUT}", text).replace(_CUT, " ")
    text = re.sub(r"\s+(?=[,.;:])", "", _tidy_space(text))
    return ", ".join(filter(None, (part.strip(" ;:_") for part in text.split(",")))).strip(" ,")


def priors(caption: str, trigger: re.Pattern[str], seed: str, num_captions: int) -> Lines:
    """Returns the caption without the trigger, then some with the name of something else in its place.

    They keep their meaning when an adapter learns the trigger. Without the others, only the trigger's absence would
    tell the two apart, and an adapter would take any subject for the trained one.

    Args:
        caption: one that may hold the trigger.
        trigger: as `phrase_pattern` and `words_pattern` give it.
        seed: chooses the other words.
        num_captions: in the whole data set; a caption of few gets more others.

    Returns:
        Nothing where the trigger is not in the caption.
    """
    if not trigger.search(caption):
        return ()
    together = re.compile(rf"(?:{trigger.pattern})(?:\s+(?:{trigger.pattern}))*", trigger.flags)
    num_others = max(_OTHERS_IN_ALL // num_captions, _FEWEST_OTHERS)
    others = random.Random(seed).sample(_THINGS.split(), num_others)  # noqa: S311
    return (without_trigger(caption, trigger), *(together.sub(word, caption) for word in others))
