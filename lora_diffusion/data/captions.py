"""Captions: where they are written, and what is left of them without the trigger."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from lora_diffusion.core.files import parse_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import sources
from lora_diffusion.data.folder import Folder, read_text
from lora_diffusion.data.known_words import LINKING, SAY_NOTHING, UNSPACED, WIDE_COMMAS, WIDE_STOPS

ENDINGS = (".txt", ".caption")
METADATA = "metadata"
"""Name of the table of Hugging Face's imagefolder: metadata.jsonl, metadata.csv, or the same with tabs."""
_TEXT_KEYS = ("text", "caption")
_LARGEST_BYTES = 2**16
"""Of a caption file; text encoders read some hundred characters of a caption."""

_THINGS = """
    airplane anchor balloon banana basket bear bed bell bicycle bird boat book bottle box bread bridge broom brush
    bus butterfly button cactus cake camera candle car carrot castle chair cheese church city clock cloud coin crown
    cup desk dog door dragon drum fan fire fish flag flower forest gift girl glass grapes guitar hammer hand hat
    heart horse house kettle key king kite knife ladder lamp leaf lemon lion man map mirror monkey moon mountain mouse
    mushroom needle notebook pencil piano pig pizza planet rabbit rainbow ring river road robot rocket rope scissors
    sea sheep shell shoe snake snow soldier spoon star sun sword table teacher telephone tent tiger tower train tree
    truck trumpet violin wheel window woman
"""
_FEWEST_OTHERS, _OTHERS_IN_ALL = 4, 64
"""Of each caption, and of all together where there are few."""

_CUT = "\0"
_BRACKET = re.compile(r"\\([()\[\]{}])")
_EMPTY_BRACKETS = re.compile(
    rf"\\?\(\s*{_CUT}\s*(?::\s*-?[\d.]+\s*)?\\?\)|\\?[\[{{]\s*{_CUT}\s*\\?[\]}}]|[\"“「『]\s*{_CUT}\s*[\"”」』]"
)
_DEEPEST = 4
"""Brackets in brackets, as in "((word))"."""
_WEIGHTED = re.compile(r"[(\[{]+([^()\[\]{}:]*)(?::[\d.\s]+)?[)\]}]+")
_LINK = rf"(?:{'|'.join(sorted(LINKING))})\b"
_DANGLING_BEFORE = re.compile(
    rf"(?:\b{_LINK}\s+|{_CUT}\s*)*{_CUT}(?=\s*(?:[,.;:{WIDE_COMMAS}{WIDE_STOPS}]|$|{_LINK}))", re.IGNORECASE
)
_DANGLING_AFTER = re.compile(rf"(^|[,.;:])\s*{_CUT}\s*(?:of|and|or)\b", re.IGNORECASE)

Lines = tuple[str, ...]
THINGS = tuple(_THINGS.split())
"""What images show, as any text encoder knows it."""


class _Rule(NamedTuple):
    """What becomes of the lines of a text."""

    meaning: str
    """In words, for the message that counts such texts."""
    of_file: Callable[[Sequence[str]], Sequence[str]]
    of_row: Callable[[Sequence[str]], Sequence[str]]
    """A row of a table holds one caption in any case, or a list of them."""


def _join(lines: Sequence[str]) -> Sequence[str]:
    return [" ".join(lines)]


LINE_RULES: Mapping[str, _Rule] = {
    "joined": _Rule(
        "each is one caption, its lines joined; data.caption_lines=each makes a caption of its own of each line",
        _join,
        _join,
    ),
    "each": _Rule("each line is a caption of its own; one of them is drawn each time", list, _join),
    "first": _Rule("only the first line is used", lambda lines: lines[:1], lambda lines: lines[:1]),
}
"""`data.caption_lines` -> what it means."""


def collect(folder: Folder, errors: list[str], line_rule: str = "joined") -> dict[Path, Lines | None]:
    """Returns the captions of each image that has a caption file or a row in a metadata.jsonl, .csv or .tsv.

    An empty tuple stands for an empty caption, None for a file that cannot be read. One message counts the texts of
    several lines.

    Args:
        folder: the files.
        errors: one line is added for each thing that is wrong.
        line_rule: one of LINE_RULES.
    """
    by_image: dict[Path, Lines | None] = {}
    origins: dict[Path, str] = {}
    reader = _Reader(folder, errors, LINE_RULES[line_rule])
    for file in folder.others:
        for image, lines in reader.read(file).items():
            if by_image.get(image, lines) != lines and None not in (lines, by_image[image]):
                errors.append(
                    f"{folder.name(image)}: {origins[image]} and {folder.name(file)} give it different captions; "
                    "keep one of them."
                )
            by_image[image], origins[image] = lines, folder.name(file)
    reader.report_long()
    return by_image


@dataclass(frozen=True)
class _Reader:
    folder: Folder
    errors: list[str]
    rule: _Rule
    long: dict[str, None] = field(default_factory=dict)
    """Names of what has texts of several lines, in order."""

    def read(self, file: Path) -> dict[Path, Lines | None]:
        if file.name == f"{METADATA}.jsonl":
            return self._gathered(self._json_lines(file))
        if file.stem == METADATA and file.suffix.lower() in sources.DELIMITERS:
            return self._gathered(self._table(file))
        if file.suffix.lower() in ENDINGS and (images := self.folder.beside(file)):
            text = read_text(self.folder, file, self.errors, _LARGEST_BYTES)
            lines = None if text is None else tuple(self._shaped(text, self.rule.of_file, self.folder.name(file)))
            return dict.fromkeys(images, lines)
        return {}

    def report_long(self) -> None:
        """Tells how many texts have several lines, and what that means."""
        if self.long:
            log = logger.info if self.rule is LINE_RULES["each"] else logger.warning
            names = name_some(list(self.long))
            log("Captions of several lines: %d (%s); %s.", len(self.long), names, self.rule.meaning)

    def _shaped(self, text: str, shape: Callable[[Sequence[str]], Sequence[str]], name: str) -> Sequence[str]:
        lines = [line for line in map(_tidy_space, text.splitlines()) if line]
        if len(lines) > 1:
            self.long[name] = None
        return shape(lines) if lines else []

    def _gathered(self, entries: Iterator[tuple[Path, Sequence[str]]]) -> dict[Path, Lines | None]:
        by_image: dict[Path, Lines | None] = {}
        for image, texts in entries:
            shaped = (self._shaped(text, self.rule.of_row, self.folder.name(image)) for text in texts)
            by_image[image] = (by_image.get(image) or ()) + tuple(line for lines in shaped for line in lines)
        return by_image

    def _json_lines(self, file: Path) -> Iterator[tuple[Path, Sequence[str]]]:
        for number, line in enumerate((read_text(self.folder, file, self.errors) or "").split("\n"), start=1):
            if line.strip():
                yield from self._entry(file, number, partial(_parse_entry, line))

    def _table(self, file: Path) -> Iterator[tuple[Path, Sequence[str]]]:
        text = read_text(self.folder, file, self.errors) or ""
        for number, row in sources.table_rows(self.folder, file, text, self.errors):
            yield from self._entry(file, number, partial(_parse_row, row))

    def _entry(
        self, file: Path, number: int, parse: Callable[[], tuple[str, Sequence[str]]]
    ) -> Iterator[tuple[Path, Sequence[str]]]:
        """Yields the image and the texts of an entry, or adds an error."""
        place = f"{self.folder.name(file)}, line {number}"
        try:
            name, texts = parse()
        except ValueError as error:
            self.errors.append(f"{place}: {error}")
            return
        image = self.folder.find(file.parent / name)
        if image:
            yield image, texts
        elif not self.folder.is_left_out(file.parent / name):
            self.errors.append(f"{place}: there is no image {shown(name)}; correct file_name or remove the line.")


def _parse_entry(line: str) -> tuple[str, Sequence[str]]:
    try:
        entry = parse_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at character {error.pos + 1}); correct the line.") from error
    except ValueError as error:
        raise ValueError(f"{error}; correct the line.") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise ValueError('has no "file_name"; write {"file_name": "cat.png", "text": "a cat"}.')
    value = next((entry[key] for key in _TEXT_KEYS if key in entry), None)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError('has no "text" or "caption" that is a string or a list of strings; add one.')
    return entry["file_name"], cast(list[str], texts)


def _parse_row(row: Mapping[str | None, Any]) -> tuple[str, Sequence[str]]:
    if None in row:  # where the reader of tables puts what is left over
        raise ValueError("has more columns than the header; put captions that hold the delimiter into quotes.")
    columns = shown(", ".join(map(str, row)))
    if not row.get("file_name"):
        raise ValueError(f'names no image; the table needs a column "file_name", and has {columns}.')
    key = next((key for key in _TEXT_KEYS if key in row), None)
    if key is None:
        raise ValueError(f'has no caption; the table needs a column "text" or "caption", and has {columns}.')
    return row["file_name"], [row[key] or ""]


def _tidy_space(text: str) -> str:
    return " ".join(text.split())


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """Returns a pattern for a fixed phrase: whole words, any case.

    Between words stand white space, underscores or hyphens; brackets may have the backslash with which some programs
    want them.
    """
    words = [_BRACKET.sub(r"\\\\?\\\1", re.escape(word)) for word in re.split(r"[\s_-]+", _plain(phrase)) if word]
    return _whole(r"[\s_-]+".join(words) or re.escape(phrase), phrase[:1], phrase[-1:])


def words_pattern(trigger: str) -> re.Pattern[str]:
    """Returns a pattern for each phrase of a trigger that was found, and each telling word of it, wherever it stands.

    Args:
        trigger: as `trigger.find` gives it, and as adapter files tell it.
    """
    phrases = [unit.strip() for unit in trigger.split(",") if unit.strip()]
    words = [word for word in re.findall(r"\w+", trigger) if word.casefold() not in SAY_NOTHING]
    patterns = [phrase_pattern(text).pattern for text in dict.fromkeys([*phrases, *words])]
    return re.compile("|".join(patterns), re.IGNORECASE)


def _plain(phrase: str) -> str:
    return re.sub(r"\\(?=[()\[\]{}])", "", phrase)


def _whole(pattern: str, first: str, last: str) -> re.Pattern[str]:
    """Wants no letter beside the pattern, except where it or its end is of a script that sets no spaces."""
    # Large ranges take long to be compiled where case is ignored.
    letter = rf"(?-i:[^\W_{UNSPACED}])"
    before, after = ("" if re.match(rf"[{UNSPACED}]", end) else letter for end in (first, last))
    return re.compile(
        f"{before and f'(?<!{before})'}{pattern}{after and f'(?!{after})'}",
        re.IGNORECASE,
    )


def without_trigger(caption: str, trigger: re.Pattern[str]) -> str:
    """Returns the caption without the trigger, and without the brackets, commas and linking words that only led to it.

    >>> without_trigger("an emoji of a cat, in blob style", phrase_pattern("blob style"))
    'an emoji of a cat'
    >>> without_trigger("(zwx:1.2), red hair", phrase_pattern("zwx"))
    'red hair'
    """
    text = trigger.sub(_CUT, caption)
    for _ in range(_DEEPEST):
        text = _EMPTY_BRACKETS.sub(_CUT, text)
    text = _DANGLING_BEFORE.sub(_CUT, text)
    text = _DANGLING_AFTER.sub(rf"\1{_CUT}", text).replace(_CUT, " ")
    text = re.sub(rf"\s+(?=[,.;:{WIDE_COMMAS}{WIDE_STOPS}])", "", _tidy_space(text))
    text = re.sub(
        rf"[{WIDE_COMMAS}](?=[{WIDE_COMMAS}{WIDE_STOPS}])|^[{WIDE_COMMAS}{WIDE_STOPS}]+|[{WIDE_COMMAS}]+$", "", text
    )
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
    together = re.compile(rf"(?:{trigger.pattern})(?:[\s,{WIDE_COMMAS}]+(?:{trigger.pattern}))*", trigger.flags)
    others = random.Random(seed).sample(THINGS, num_others(num_captions))  # noqa: S311
    return (without_trigger(caption, trigger), *(_with_other(caption, together, word) for word in others))


def num_others(num_captions: int) -> int:
    """Returns how many other words each caption of a data set is tried with."""
    return max(_OTHERS_IN_ALL // num_captions, _FEWEST_OTHERS)


def _with_other(caption: str, trigger: re.Pattern[str], word: str) -> str:
    """Returns the caption with a word in place of the trigger, but as one tag at most: never "woman, woman, woman"."""
    text, count = trigger.subn(word, caption)
    if count == 1:
        return text
    tags = re.split(rf"([,{WIDE_COMMAS}]\s*)", text)
    repeated = [at for at in range(0, len(tags), 2) if _WEIGHTED.sub(r"\1", tags[at]).strip() == word][1:]
    return "".join(tag for at, tag in enumerate(tags) if at not in repeated and at + 1 not in repeated)
