"""Transcripts as files: plain text, the subtitles of SubRip and WebVTT, tables and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, write_text
from lora_diffusion.data.listening import list_named
from lora_diffusion.data.transcripts import without_timestamps
from lora_diffusion.workflows.transcription import Adapters, Transcription, transcribe

Transcriptions = Sequence[Transcription]
_SHORTEST_S = 0.02
"""Of a subtitle, which must end after it begins."""


def _txt(transcriptions: Transcriptions) -> str:
    return "".join(f"{line}\n" for one in transcriptions for line in _lines(one))


def _lines(one: Transcription) -> list[str]:
    plain = without_timestamps(one.text)
    if plain == one.text:
        return [plain]
    return [f"[{_span(cue.start_s, cue.end_s, '.')}] {cue.text}" for cue in one.segments]


def _srt(transcriptions: Transcriptions) -> str:
    return "\n".join(
        f"{number}\n{_span(cue.start_s, cue.end_s, ',')}\n{cue.text}\n"
        for one in transcriptions
        for number, cue in enumerate(one.segments, start=1)
    )


def _vtt(transcriptions: Transcriptions) -> str:
    cues = (
        f"{_span(cue.start_s, cue.end_s, '.')}\n{html.escape(cue.text, quote=False)}\n"
        for one in transcriptions
        for cue in one.segments
    )
    return "\n".join(["WEBVTT\n", *cues])


def _csv(transcriptions: Transcriptions) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("file", "start_s", "end_s", "text"))
    for one in transcriptions:
        writer.writerows((one.path, f"{cue.start_s:.2f}", f"{cue.end_s:.2f}", cue.text) for cue in one.segments)
    return stream.getvalue()


def _json(transcriptions: Transcriptions) -> str:
    values = [
        {"file": str(one.path), "text": without_timestamps(one.text), "segments": [vars(cue) for cue in one.segments]}
        for one in transcriptions
    ]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Transcriptions], str]] = {
    "txt": _txt,
    "srt": _srt,
    "vtt": _vtt,
    "csv": _csv,
    "json": _json,
}
"""Ending -> what writes transcripts so."""
_OF_ONE = ("srt", "vtt")
"""Formats whose files are about one recording."""


@dataclass(frozen=True)
class Written:
    """Transcripts as they were asked for."""

    text: str
    """All of them, where no file was named."""
    files: tuple[Path, ...]


def write_transcripts(
    model: ModelOptions,
    paths: Sequence[Path],
    adapters: Adapters,
    form: str,
    output: Path | None = None,
    *,
    overwrite: bool = False,
) -> Written:
    """Writes down what is said in recordings.

    Args:
        model: a base that listens; its `timestamps` decide whether subtitles follow sentences or whole pieces.
        paths: recordings, and folders of them.
        adapters: files or folders with their weights; all are applied at once.
        form: one of FORMATS.
        output: a file of that ending, or a folder, which gets a file for each recording; None writes none.
        overwrite: files may be there.

    Raises:
        InputError: as `transcribe` does; or a file cannot be written, which is told before anything is heard.
    """
    files = _plan(list_named(paths), form, output, overwrite=overwrite)
    transcriptions = transcribe(model, paths, adapters)
    for file, own in files.items():
        write_text(file, FORMATS[form]([one for one in transcriptions if one.path in own]))
    return Written("" if files else FORMATS[form](transcriptions), tuple(files))


def _plan(paths: Sequence[Path], form: str, output: Path | None, *, overwrite: bool) -> dict[Path, list[Path]]:
    """Returns file -> the recordings whose transcripts it gets; none to print all."""
    if output is None or output.suffix.lower() == f".{form}":
        if form in _OF_ONE and len(paths) > 1:
            raise ConfigError(
                f"--format {form} holds one recording in a file, and these are {len(paths)}; name a folder with "
                "--output DIR."
            )
        files = {} if output is None else {output: list(paths)}
    else:
        by_file: defaultdict[Path, list[Path]] = defaultdict(list)
        for path in paths:
            by_file[output / f"{path.stem}.{form}"].append(path)
        files = dict(by_file)
        twins = next((own for own in files.values() if len(own) > 1), None)
        if twins:
            raise ConfigError(
                f"--output {output}: {' and '.join(map(str, twins))} would share a file; transcribe them one by one."
            )
    taken = [file for file in files if file.exists() and (file.is_dir() or not overwrite)]
    if taken:
        raise ConfigError(f"--output: {taken[0]} is there already; name another, or add --overwrite.")
    for folder in {file.parent for file in files}:
        check_writable(folder, "--output")
    return files


def _span(start_s: float, end_s: float, comma: str) -> str:
    return f"{_moment(start_s, comma)} --> {_moment(max(end_s, start_s + _SHORTEST_S), comma)}"


def _moment(seconds: float, comma: str) -> str:
    """Returns a moment as subtitles write it.

    >>> _moment(3661.5, ",")
    '01:01:01,500'
    """
    minutes, rest = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{comma}{rest % 1000:03}"
