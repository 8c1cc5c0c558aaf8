"""Transcripts of recordings by a base, with or without adapters."""

from __future__ import annotations

import csv
import html
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import ModelOptions, RecordingDataConfig
from lora_diffusion.core.base_model import Loaded, SpeechInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, write_text
from lora_diffusion.core.samples import AudioText, Output, Request
from lora_diffusion.data.sample_types import RECORDINGS
from lora_diffusion.data.sources import ALL_SPLITS
from lora_diffusion.data.speech_folder import list_named, list_requests
from lora_diffusion.data.transcripts import Segment, cues, later, without_timestamps
from lora_diffusion.evaluation.texts import (
    SetScores,
    TranscriptEvaluation,
    evaluate_transcripts,
    whisper_normalizer,
)
from lora_diffusion.workflows.load import CheckedModel, Model, check_model

Adapters = Sequence[tuple[Path, float]]
_EVERYTHING = RecordingDataConfig(split=ALL_SPLITS)
"""To score on, all of a folder is taken, since its user chose it for that."""


@dataclass(frozen=True)
class Transcription:
    """The transcript of one recording."""

    path: Path
    text: str
    segments: tuple[Segment, ...] = ()
    """The words with their times: from timestamps, else those of each piece of the recording."""


@dataclass(frozen=True)
class Transcripts:
    """The transcripts of several recordings."""

    transcriptions: tuple[Transcription, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns recording -> text."""
        return {str(one.path): one.text for one in self.transcriptions}

    def text(self) -> str:
        """Returns one line for each recording."""
        return "\n".join(f"{path}\t{text}" for path, text in self.to_json().items())


def transcribe(model: ModelOptions | Model, paths: Sequence[Path], adapters: Adapters = ()) -> Transcripts:
    """Returns what is said in recordings; those that are too long for the base are transcribed in pieces.

    Args:
        model: a base of speech recognition, or one that is loaded.
        paths: recordings, and folders of them.
        adapters: files or folders with their weights; all are applied at once.

    Raises:
        InputError: the base, an adapter or a recording cannot be used; all errors of recordings are listed at once.
    """
    checked, info = _check(model, adapters)
    listed = list_requests(paths, info)
    outputs = checked.load().answer([request for _, request in listed])
    texts: dict[Path, list[str]] = {}
    segments: dict[Path, list[Segment]] = {}
    for (path, request), output in zip(listed, outputs, strict=True):
        sample = request.sample
        assert isinstance(sample, AudioText), "requests to transcribe hold a recording"
        text = later(output.text, sample.start_s)
        texts.setdefault(path, []).append(text)
        end_s = sample.start_s + len(sample.waveforms[0]) / info.sampling_rate
        segments.setdefault(path, []).extend(cues(text, sample.start_s, end_s))
    return Transcripts(
        tuple(Transcription(path, " ".join(pieces), tuple(segments[path])) for path, pieces in texts.items())
    )


def score_transcripts(
    model: ModelOptions | Model,
    data_paths: Sequence[Path],
    adapters: Adapters = (),
    data: RecordingDataConfig = _EVERYTHING,
) -> SetScores[TranscriptEvaluation]:
    """Compares the output for folders of recordings with their transcripts; one result for each folder.

    Args:
        model: a base of speech recognition, or one that is loaded.
        data_paths: folders, as `data.path` takes them.
        adapters: files or folders with their weights; all are applied at once.
        data: how they are read, all but their path and the views of the sound.

    Raises:
        InputError: the base, an adapter or the data cannot be used.
    """
    checked, info = _check(model, adapters)
    plain = replace(data, speeds=RecordingDataConfig.speeds, noise_db=())
    sets = [RECORDINGS.read(replace(plain, path=str(path)), info) for path in data_paths]
    loaded = checked.load()
    scores = tuple(compare(loaded.answer, loaded.loaded, samples) for samples in sets)
    return SetScores(tuple(data_paths), scores)


def compare(
    generate: Callable[[Sequence[Request]], Sequence[Output]], loaded: Loaded, samples: Sequence[AudioText]
) -> TranscriptEvaluation:
    """Compares the transcripts of a loaded base with those of samples."""
    opened = [RECORDINGS.open(sample, RecordingDataConfig()) for sample in samples]
    outputs = generate([Request("", 0, sample=one) for one in opened])
    references = [without_timestamps(sample.transcript) for sample in samples]
    transcripts = [without_timestamps(output.text) for output in outputs]
    languages = [_written(sample, loaded.options) for sample in samples]
    normalizers = {language: whisper_normalizer(language, loaded.info.path) for language in set(languages)}
    keys = [sample.key for sample in samples]
    return evaluate_transcripts(keys, references, transcripts, [normalizers[language] for language in languages])


def _written(sample: AudioText, options: Any) -> str:
    """Returns the language of a transcript; translations are into English."""
    language, task = sample.language_and_task(options)
    return "en" if task == "translate" else language


def _check(model: ModelOptions | Model, adapters: Adapters) -> tuple[CheckedModel | Model, SpeechInfo]:
    checked = check_model(model, adapters, RECORDINGS)
    assert isinstance(checked.info, SpeechInfo), "a family of recordings describes its base so"
    return checked, checked.info


_SHORTEST_S = 0.02
"""Of a subtitle, which must end after it begins."""


def _txt(transcriptions: Sequence[Transcription]) -> str:
    return "".join(f"{line}\n" for one in transcriptions for line in _lines(one))


def _lines(one: Transcription) -> list[str]:
    plain = without_timestamps(one.text)
    if plain == one.text:
        return [plain]
    return [f"[{_span(cue.start_s, cue.end_s, '.')}] {cue.text}" for cue in one.segments]


def _srt(transcriptions: Sequence[Transcription]) -> str:
    return "\n".join(
        f"{number}\n{_span(cue.start_s, cue.end_s, ',')}\n{cue.text}\n"
        for one in transcriptions
        for number, cue in enumerate(one.segments, start=1)
    )


def _vtt(transcriptions: Sequence[Transcription]) -> str:
    cues = (
        f"{_span(cue.start_s, cue.end_s, '.')}\n{html.escape(cue.text, quote=False)}\n"
        for one in transcriptions
        for cue in one.segments
    )
    return "\n".join(["WEBVTT\n", *cues])


def _csv(transcriptions: Sequence[Transcription]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("file", "start_s", "end_s", "text"))
    for one in transcriptions:
        writer.writerows((one.path, f"{cue.start_s:.2f}", f"{cue.end_s:.2f}", cue.text) for cue in one.segments)
    return stream.getvalue()


def _json(transcriptions: Sequence[Transcription]) -> str:
    values = [
        {"file": str(one.path), "text": without_timestamps(one.text), "segments": [vars(cue) for cue in one.segments]}
        for one in transcriptions
    ]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Transcription]], str]] = {
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
class WrittenTranscripts:
    """Transcripts in a format."""

    files: tuple[Path, ...]
    document: str
    """All of them as the text of a file, where no file was named."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"files": [*map(str, self.files)]}

    def text(self) -> str:
        """Returns lines for people."""
        return "\n".join(f"Wrote {file}." for file in self.files)


def write_transcripts(
    model: ModelOptions | Model,
    paths: Sequence[Path],
    adapters: Adapters,
    form: str,
    output: Path | None = None,
    *,
    overwrite: bool = False,
) -> WrittenTranscripts:
    """Writes down what is said in recordings.

    Args:
        model: a base of speech recognition; its `timestamps` decide whether subtitles follow sentences or whole pieces.
        paths: recordings, and folders of them.
        adapters: files or folders with their weights; all are applied at once.
        form: one of FORMATS.
        output: a file of that ending, or a folder, which gets a file for each recording; None writes none.
        overwrite: files may be there.

    Raises:
        InputError: as `transcribe` does; or a file cannot be written, which is checked before anything is transcribed.
    """
    files = _plan(list_named(paths), form, output, overwrite=overwrite)
    transcriptions = transcribe(model, paths, adapters).transcriptions
    for file, recordings in files.items():
        write_text(file, FORMATS[form]([one for one in transcriptions if one.path in recordings]))
    return WrittenTranscripts(tuple(files), "" if files else FORMATS[form](transcriptions))


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
        twins = next((recordings for recordings in files.values() if len(recordings) > 1), None)
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
