"""Transcripts: where they are written, and the timestamps in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.core.files import parse_json
from lora_diffusion.core.text import shown
from lora_diffusion.data import sources
from lora_diffusion.data.folder import Folder, read_text

BESIDE = ".txt"
OF_A_CHAPTER = ".trans.txt"
"""How LibriSpeech's files end that hold a name and a transcript in each line."""
_LARGEST_BYTES = 2**20
"""Of a transcript; hours of speech have a third."""
_TABLES = (".csv", ".tsv", ".jsonl")
FILE_KEYS = ("file_name", "file", "path", "audio")
TEXT_KEYS = ("transcription", "transcript", "text", "sentence")
_LANGUAGE_KEYS = ("language", "lang", "locale")
_SUBFOLDERS = ("", "clips", "wavs")
"""Where a table's recordings may lie: beside it, or as in Common Voice and LJSpeech."""
_TIMESTAMP = re.compile(r"<\|(\d+\.\d\d)\|>")
TASKS = ("transcribe", "translate")


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording, and what a table says of it besides."""

    text: str
    language: str | None = None
    task: str | None = None
    origin: str = ""
    """Where it is written, for messages."""


@dataclass(frozen=True)
class Segment:
    """A piece of a transcript between two timestamps, in seconds."""

    start_s: float
    end_s: float
    text: str


def collect(folder: Folder, errors: list[str], split: str = sources.AUTO_SPLIT) -> dict[Path, Transcript | None]:
    """Returns the transcript of each recording that has one: a text file beside it, or a line of a table.

    None stands for one that cannot be used, which is an error already.

    Tables are metadata.csv, metadata.tsv and any .jsonl file, with the columns file_name and transcription (or text,
    sentence, transcript), and language (lang, locale) and task if need be; those of splits, such as Common Voice's
    train.tsv; LibriSpeech's *.trans.txt; and LJSpeech's metadata.csv, which has no header.

    Args:
        folder: the files.
        errors: one line is added for each thing that is wrong.
        split: `data.split`, which may name a table.
    """
    by_path: dict[Path, Transcript | None] = {}
    for file in folder.others:
        for path, transcript in _read(folder, file, errors, split):
            earlier = by_path.get(path, transcript)
            if earlier and transcript and earlier.text != transcript.text:
                origins = f"{earlier.origin} and {transcript.origin}"
                errors.append(f"{folder.name(path)}: {origins} say different things; keep one of them.")
                by_path[path] = None
            else:  # what is an error already stays one, whatever another line says
                by_path[path] = transcript if earlier else None
    return by_path


def tables_of_splits(folder: Folder, split: str) -> list[Path]:
    """Returns the tables that are read and belong to a split, so that recordings need not stand in them."""
    return [file for file in folder.others if _is_table(file, split) and _is_of_split(file, split)]


def _is_table(file: Path, split: str) -> bool:
    suffix = file.suffix.lower()
    return suffix == ".jsonl" or (suffix in _TABLES and (file.stem == "metadata" or _is_of_split(file, split)))


def _is_of_split(file: Path, split: str) -> bool:
    return (
        sources.is_of_split(file.stem, "train")
        or sources.is_held_out(file.stem)
        or sources.is_of_split(file.stem, split)
    )


def of_row(row: Mapping[str, Any], origin: str) -> Transcript:
    """Returns the transcript of a row of a table.

    Raises:
        ValueError: it has none, or names an unknown task.
    """
    text = next((row[key] for key in TEXT_KEYS if isinstance(row.get(key), str)), None)
    if None in row:  # where the reader of tables puts what is left over
        raise ValueError("has more columns than the header; put texts that hold the delimiter into quotes.")
    if text is None:
        raise ValueError(f"has no transcript; give it a column {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}.")
    task = row.get("task") or None
    if task not in (None, *TASKS):
        raise ValueError(f"asks for the task {shown(repr(task))}; use {' or '.join(TASKS)}.")
    language = next((row[key] for key in _LANGUAGE_KEYS if row.get(key)), None)
    if not isinstance(language, str | None):
        raise ValueError(f"gives {shown(repr(language))} for the language; write its code, such as en.")
    return Transcript(" ".join(text.split()), language, task, origin)


def segments(text: str) -> list[Segment]:
    """Returns the pieces of a transcript with timestamps; none if it has no timestamps.

    >>> segments("<|0.00|> one<|1.50|><|2.00|> two<|3.10|>")
    [Segment(start_s=0.0, end_s=1.5, text=' one'), Segment(start_s=2.0, end_s=3.1, text=' two')]
    """
    pieces = _TIMESTAMP.split(text)
    triples = zip(pieces[1::2], pieces[2::2], pieces[3::2], strict=False)
    return [Segment(float(start), float(end), words) for start, words, end in triples if words.strip()]


def without_timestamps(text: str) -> str:
    """Returns the words alone.

    >>> without_timestamps("<|0.00|> one two<|1.50|>")
    'one two'
    """
    return " ".join(_TIMESTAMP.sub(" ", text).split())


def later(text: str, seconds: float) -> str:
    """Returns a transcript with its timestamps, if it has any, moved by some seconds.

    >>> later("<|0.00|> one<|1.50|>", 30.0)
    '<|30.00|> one<|31.50|>'
    """
    return _TIMESTAMP.sub(lambda match: f"<|{float(match[1]) + seconds:.2f}|>", text)


def cues(text: str, start_s: float, end_s: float) -> list[Segment]:
    """Returns all words of what was heard between two moments, with when they were said as far as timestamps tell.

    Args:
        text: its timestamps count from the beginning of the recording; it may have none.
        start_s: when the words before the first timestamp begin.
        end_s: when those after the last end; later timestamps mean it too.

    >>> cues("<|30.00|> one<|31.50|><|31.50|> two", 30.0, 33.0)
    [Segment(start_s=30.0, end_s=31.5, text='one'), Segment(start_s=31.5, end_s=33.0, text='two')]
    """
    pieces = _TIMESTAMP.split(text)
    marks = [min(max(mark, start_s), end_s) for mark in (start_s, *map(float, pieces[1::2]), end_s)]
    spoken = [(words.strip(), index) for index, words in enumerate(pieces[::2]) if words.strip()]
    return [Segment(marks[index], max(marks[index + 1], marks[index]), words) for words, index in spoken]


def join(pieces: list[Segment], longest_s: float) -> list[list[Segment]]:
    """Returns neighbouring segments in groups that last at most `longest_s`, as few as there can be.

    Raises:
        ValueError: a single segment is longer, or they are out of order.
    """
    groups: list[list[Segment]] = []
    for piece in pieces:
        if piece.end_s - piece.start_s > longest_s:
            raise ValueError(
                f"its timestamps {piece.start_s:.2f} and {piece.end_s:.2f} are more than {longest_s:g} s apart"
            )
        if piece.end_s <= piece.start_s or (groups and piece.start_s < groups[-1][-1].end_s):
            raise ValueError(f"its timestamp {piece.start_s:.2f} is out of order")
        if groups and piece.end_s - groups[-1][0].start_s <= longest_s:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def shifted(pieces: list[Segment]) -> str:
    """Returns the transcript of a group of segments, its timestamps counted from the start of the first."""
    start = pieces[0].start_s
    return "".join(f"<|{p.start_s - start:.2f}|>{p.text}<|{p.end_s - start:.2f}|>" for p in pieces)


def _read(folder: Folder, file: Path, errors: list[str], split: str) -> Iterator[tuple[Path, Transcript | None]]:
    if file.name.lower().endswith(OF_A_CHAPTER) or _is_table(file, split):
        text = read_text(folder, file, errors)
        yield from _read_table(folder, file, text or "", errors)
    elif file.suffix.lower() == BESIDE:
        recordings = folder.beside(file)
        text = read_text(folder, file, errors, _LARGEST_BYTES) if recordings else None
        for path in recordings:
            yield path, None if text is None else Transcript(" ".join(text.split()), origin=folder.name(file))


def _read_table(folder: Folder, file: Path, text: str, errors: list[str]) -> Iterator[tuple[Path, Transcript | None]]:
    for number, content in _rows(folder, file, text, errors):
        place = f"{folder.name(file)}, line {number}"
        try:
            row = _parsed(content) if isinstance(content, str) else content
            if not isinstance(row, dict):
                raise ValueError("is no JSON object; correct the line.")
            name = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), None)
            if name is None:
                raise ValueError('names no file; give it a column "file_name".')
            path = _find(folder, file.parent, name)
            if path is not None:
                yield path, _usable(row, place, errors)
            elif not any(file.parent / below / name in folder.left_out for below in _SUBFOLDERS):
                raise ValueError(f"there is no recording {shown(name)}; correct the name or remove the line.")
        except ValueError as error:
            errors.append(f"{place}: {error}")


def _find(folder: Folder, base: Path, name: str) -> Path | None:
    """Returns the recording that a table names, maybe without its ending."""
    for place in _SUBFOLDERS:
        if path := folder.find(base / place / name):
            return path
        if alike := folder.beside(base / place / f"{name}{BESIDE}"):
            return alike[0]
    return None


def _usable(row: Mapping[str, Any], place: str, errors: list[str]) -> Transcript | None:
    try:
        return of_row(row, place)
    except ValueError as error:
        errors.append(f"{place}: {error}")
        return None


def _rows(folder: Folder, file: Path, text: str, errors: list[str]) -> Iterator[tuple[int, Any]]:
    """Yields the number of each line, and what it holds: the JSON text, or a row of a table."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from _lines(text)
    elif suffix == BESIDE:
        named = ((number, line.partition(" ")) for number, line in _lines(text))
        yield from ((number, {FILE_KEYS[0]: name, TEXT_KEYS[0]: words}) for number, (name, _, words) in named)
    elif suffix == ".tsv" and file.stem != "metadata":
        yield from _common_voice(text)
    elif _has_no_header(text):
        cells = ((number, line.split("|")) for number, line in _lines(text))
        yield from ((number, {FILE_KEYS[0]: row[0], TEXT_KEYS[0]: row[-1]}) for number, row in cells)
    else:
        yield from sources.table_rows(folder, file, text, errors)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return ((number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _has_no_header(text: str) -> bool:
    """Says whether a table is in LJSpeech's form: name|transcript|transcript with its numbers written out."""
    first = text.partition("\n")[0]
    return "|" in first and not any(key in first.replace("|", ",").split(",") for key in FILE_KEYS)


def _common_voice(text: str) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a table in which a quotation mark is a letter, but for a pair around a whole cell."""
    lines = _lines(text)
    header = next(lines, (0, ""))[1].split("\t")
    for number, line in lines:
        cells = line.split("\t")
        if len(cells) > len(header):
            yield number, {None: cells}
        else:
            yield number, dict(zip(header, map(_unquoted, cells), strict=False))


def _unquoted(cell: str) -> str:
    inner = cell[1:-1]
    is_quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if is_quoted else cell


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except json.JSONDecodeError:
        return None
    except ValueError as error:
        raise ValueError(f"{error}; correct the line.") from error
