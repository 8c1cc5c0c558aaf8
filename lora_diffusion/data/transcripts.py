"""Transcripts: where they are written, and the timestamps in them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.data.folder import Folder, parse_json, read_text

BESIDE = ".txt"
_LARGEST_BYTES = 2**20
"""Of a transcript; hours of speech have a third."""
_TABLES = (".csv", ".tsv", ".jsonl")
FILE_KEYS = ("file_name", "file", "path", "audio")
TEXT_KEYS = ("transcription", "transcript", "text", "sentence")
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


def collect(folder: Folder, faults: list[str]) -> dict[Path, Transcript | None]:
    """Returns the transcript of each recording that has one: a text file beside it, or a line of a table.

    None stands for one that cannot be used, which is a fault already.

    Tables are metadata.csv, metadata.tsv and any .jsonl file, with the columns file_name and transcription (or text,
    sentence, transcript), and language and task if need be.

    Args:
        folder: the files.
        faults: one line is added for each thing that is wrong.
    """
    found: dict[Path, Transcript | None] = {}
    for file in folder.others:
        for path, transcript in _read(folder, file, faults):
            earlier = found.get(path)
            if earlier and transcript and earlier.text != transcript.text:
                origins = f"{earlier.origin} and {transcript.origin}"
                faults.append(f"{folder.name(path)}: {origins} say different things; keep one of them.")
            found[path] = transcript
    return found


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
        raise ValueError(f"asks for the task {task!r}; use {' or '.join(TASKS)}.")
    return Transcript(" ".join(text.split()), row.get("language") or None, task, origin)


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
    return _TIMESTAMP.sub(lambda found: f"<|{float(found[1]) + seconds:.2f}|>", text)


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


def _read(folder: Folder, file: Path, faults: list[str]) -> Iterator[tuple[Path, Transcript | None]]:
    suffix = file.suffix.lower()
    if suffix == BESIDE:
        recordings = folder.beside(file)
        text = read_text(folder, file, faults, _LARGEST_BYTES) if recordings else None
        for path in recordings:
            yield path, None if text is None else Transcript(" ".join(text.split()), origin=folder.name(file))
    elif suffix == ".jsonl" or (suffix in _TABLES and file.stem == "metadata"):
        text = read_text(folder, file, faults)
        yield from _read_table(folder, file, text or "", faults)


def _read_table(folder: Folder, file: Path, text: str, faults: list[str]) -> Iterator[tuple[Path, Transcript | None]]:
    for number, content in _rows(folder, file, text, faults):
        place = f"{folder.name(file)}, line {number}"
        try:
            row = _parsed(content) if isinstance(content, str) else content
            if not isinstance(row, dict):
                raise ValueError("is no JSON object; correct the line.")
            name = next((row[key] for key in FILE_KEYS if isinstance(row.get(key), str)), None)
            if name is None:
                raise ValueError('names no file; give it a column "file_name".')
            path = folder.find(file.parent / name)
            if path is None:
                raise ValueError(f"there is no recording {name}; correct the name or remove the line.")
            yield path, _usable(row, place, faults)
        except ValueError as error:
            faults.append(f"{place}: {error}")


def _usable(row: Mapping[str, Any], place: str, faults: list[str]) -> Transcript | None:
    try:
        return of_row(row, place)
    except ValueError as error:
        faults.append(f"{place}: {error}")
        return None


def _rows(folder: Folder, file: Path, text: str, faults: list[str]) -> Iterator[tuple[int, Any]]:
    """Yields the number of each line, and what it holds: the JSON text, or a row of a table."""
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, line
        return
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    start = 1
    try:
        start += bool(reader.fieldnames)
        for row in reader:
            yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as error:
        place = f"{folder.name(file)}, line {start}"
        faults.append(f"{place}: cannot be read ({error}); look for a quote without its pair.")


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except (json.JSONDecodeError, RecursionError):
        return None
