"""Recordings: those of a folder with their transcripts, and those that are only transcribed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from lora_diffusion.config.schema import RecordingDataConfig
from lora_diffusion.core.base_model import SpeechInfo
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import AudioText, Request
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import audio, preflight, sources, transcripts
from lora_diffusion.data.audio import Facts, RecordingError
from lora_diffusion.data.folder import Folder, stop_or_leave_out
from lora_diffusion.data.transcripts import Transcript
from lora_diffusion.runtime.progress import watch

_NUM_THREADS = 4


@dataclass(frozen=True)
class RecordingReport:
    """Facts about a data set of recordings, named by their key."""

    num_recordings: int
    num_shown: int
    """Recordings in an epoch, repeats counted."""
    total_s: float
    longest: tuple[str, float]
    """The longest recording and its seconds."""
    num_words: int
    longest_transcript: tuple[str, int]
    """The recording with the longest transcript, and its words."""
    languages: dict[str, int]
    """Language code -> recordings; "" stands for that of the model options."""
    same_transcript: tuple[tuple[str, ...], ...]
    """Groups of recordings with equal transcripts."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""
        languages = ", ".join(f"{code or 'as model.language'} ({count})" for code, count in self.languages.items())
        total = audio.clock(self.total_s)
        lines = [
            f"Recordings:   {self.num_recordings}, {self.num_shown} heard in an epoch, {total} in all",
            f"Longest:      {audio.clock(self.longest[1])} ({self.longest[0]})",
            f"Transcripts:  {self.num_words} words, the longest has {self.longest_transcript[1]} "
            f"({self.longest_transcript[0]})",
            f"Languages:    {languages}",
        ]
        if self.same_transcript:
            lines.append(f"Say the same: {name_some([' = '.join(group) for group in self.same_transcript], 10)}")
        return lines


def read(config: RecordingDataConfig, info: SpeechInfo) -> list[AudioText]:
    """Returns the recordings of a folder, or of a data set of rows, with their transcripts; decodes each once.

    Raises:
        DataError: the data cannot be used; all errors are listed at once.
    """
    errors: list[str] = []
    folder, recordings = (_list_rows if sources.are_rows(config.path) else _list_files)(config, errors)
    checked = _check_all(folder, recordings, config, info, errors)
    samples = []
    for recording, facts in checked:
        samples += _samples(recording, facts, config, info, errors)
    samples = _count_tokens(samples, info, errors)
    stop_or_leave_out(folder, "transcripts", errors, len(samples), skip_bad=config.skip_bad)
    _report(samples, checked, info)
    return samples


def open_sample(sample: AudioText, config: RecordingDataConfig) -> AudioText:
    """Returns the sample with its sound decoded at each speed, clean and with each noise."""
    import torch

    content = sample.read_bytes or sample.path
    sound = audio.decode(content, sample.sampling_rate, sample.start_s, sample.duration_s)
    views = []
    for speed in config.speeds:
        clean = audio.at_speed(sound, speed, sample.sampling_rate)
        views += [clean, *(audio.with_noise(clean, ratio) for ratio in config.noise_db)]
    return replace(sample, waveforms=tuple(torch.from_numpy(view).float() for view in views))


def describe(samples: Sequence[AudioText]) -> RecordingReport:
    """Returns the facts of samples that `read` returned."""
    words = {sample.key: len(transcripts.without_timestamps(sample.transcript).split()) for sample in samples}
    by_text: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        by_text[sample.transcript].append(sample.key)
    longest = max(samples, key=lambda sample: sample.duration_s)
    return RecordingReport(
        num_recordings=len(samples),
        num_shown=sum(sample.num_repeats for sample in samples),
        total_s=sum(sample.duration_s for sample in samples),
        longest=(longest.key, longest.duration_s),
        num_words=sum(words.values()),
        longest_transcript=max(words.items(), key=lambda item: item[1]),
        languages=dict(Counter(sample.language or "" for sample in samples).most_common()),
        same_transcript=tuple(tuple(keys) for keys in by_text.values() if len(keys) > 1),
    )


@dataclass(frozen=True)
class _Recording:
    key: str
    path: Path
    transcript: Transcript | None
    """None where it has none that can be used, which is an error already."""
    read_bytes: Callable[[], bytes] | None = None


def _list_files(config: RecordingDataConfig, errors: list[str]) -> tuple[Folder, list[_Recording]]:
    folder = sources.choose_split(preflight.list_recordings(config.path), config.split)
    texts = transcripts.collect(folder, errors, config.split)
    plain = [file for file in folder.others if not file.name.lower().endswith(transcripts.OF_A_CHAPTER)]
    preflight.warn_of_orphans(replace(folder, others=tuple(plain)), "transcript", (transcripts.BESIDE,))
    lacking = [path for path in folder.files if path not in texts]
    tables = transcripts.tables_of_splits(folder, config.split)
    if len(lacking) == len(folder.files):
        if not errors:  # else what is wrong with the table is the reason
            errors.append(_explain_no_transcript(folder, len(lacking)))
    elif tables and lacking:
        names = [folder.name(path) for path in lacking]
        where = name_some([folder.name(table) for table in tables])
        logger.warning("Left out recordings that do not stand in %s: %d (%s).", where, len(names), name_some(names))
        folder = replace(folder, files=tuple(path for path in folder.files if path in texts))
    else:
        errors += [f"{folder.name(path)}: has no transcript; write {path.stem}.txt beside it." for path in lacking]
    named = {folder.name(path): texts.get(path) for path in folder.files}
    usable = _with_words(named.items(), errors)
    return folder, [_Recording(folder.name(path), path, usable.get(folder.name(path))) for path in folder.files]


def _explain_no_transcript(folder: Folder, count: int) -> str:
    tables = [folder.name(file) for file in folder.others if file.suffix.lower() in (".csv", ".tsv")]
    other = f"; {name_some(tables)} is read with data.split set to its name without ending" if tables else ""
    return (
        f"None of the {count} recordings has a transcript: write it into name.txt beside name.wav, or into a "
        f"metadata.csv with the columns file_name and transcription{other}."
    )


def _list_rows(config: RecordingDataConfig, errors: list[str]) -> tuple[Folder, list[_Recording]]:
    table = sources.read_rows(config.path, config.split, transcripts.FILE_KEYS, "Audio", "recordings")
    named: dict[str, Transcript | None] = {}
    for index in range(len(table.files)):
        name = f"row {index}"
        try:
            if not table.files[index]:
                raise ValueError("holds no recording; remove it.")
            named[name] = transcripts.of_row(table.texts[index], name)
        except ValueError as error:
            errors.append(f"{name}: {error}")
    usable = _with_words(named.items(), errors)
    recordings = [
        _Recording(name, table.root, usable[name], files[0])
        for name, files in ((f"row {index}", files) for index, files in enumerate(table.files))
        if name in usable
    ]
    paths = tuple(table.root / recording.key for recording in recordings)
    return Folder(table.root, "recordings", paths, (), f"data.path={config.path}"), recordings


def _with_words(named: Iterable[tuple[str, Transcript | None]], errors: list[str]) -> dict[str, Transcript]:
    """Returns the transcripts that hold a word, by the name of the recording; those that do not are errors."""
    usable = {}
    for name, transcript in named:
        if transcript and transcripts.without_timestamps(transcript.text):
            usable[name] = transcript
        elif transcript:
            place = f" in {transcript.origin}" if transcript.origin != name else ""
            errors.append(f"{name}: its transcript{place} is empty; write one.")
    return usable


def _check_all(
    folder: Folder,
    recordings: Sequence[_Recording],
    config: RecordingDataConfig,
    info: SpeechInfo,
    errors: list[str],
) -> list[tuple[_Recording, Facts]]:
    """Returns the recordings that can be used, with their facts; the others are errors."""
    longest_s = info.max_duration_s * min(config.speeds)
    remedy = "cut it, or set data.long=split if its transcript has timestamps"
    if config.long == "split":
        longest_s, remedy = audio.LONGEST_S, "cut it"

    def check(recording: _Recording) -> Facts | str:
        try:
            return audio.check(recording.read_bytes or recording.path, longest_s, remedy)
        except RecordingError as error:
            return error.reason

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = list(watch(pool.map(check, recordings), len(recordings), f"Checking {folder.noun}"))
    pairs = list(zip(recordings, results, strict=True))
    errors += [f"{recording.key}: {facts}" for recording, facts in pairs if isinstance(facts, str)]
    return [(recording, facts) for recording, facts in pairs if not isinstance(facts, str)]


def _samples(
    recording: _Recording, facts: Facts, config: RecordingDataConfig, info: SpeechInfo, errors: list[str]
) -> list[AudioText]:
    """Returns a recording as one sample, or in pieces where it is long; none and an error if that cannot be."""
    transcript = recording.transcript
    if transcript is None:
        return []
    try:
        whole = AudioText(
            key=recording.key,
            path=recording.path,
            transcript=transcript.text,
            language=_language(transcript, info),
            task=transcript.task,
            duration_s=facts.duration_s,
            sampling_rate=info.sampling_rate,
            read_bytes=recording.read_bytes,
        )
        longest_s = info.max_duration_s * min(config.speeds)
        return [whole] if facts.duration_s <= longest_s else list(_cut(whole, longest_s))
    except ValueError as error:
        errors.append(f"{recording.key}: {error}")
        return []


def _language(transcript: Transcript, info: SpeechInfo) -> str | None:
    """Returns the code of the language that a table names, maybe in words.

    Raises:
        ValueError: the base does not know it, or cannot translate.
    """
    if transcript.task == "translate" and not info.languages:
        raise ValueError(f"asks for a translation, and {info.source} knows English only; take a multilingual base.")
    if not transcript.language:
        return None
    code = info.find_language(transcript.language) if info.find_language else transcript.language
    known = info.languages or ("en",)
    if code in known:
        return code
    if not info.languages:
        raise ValueError(
            f"is in {shown(transcript.language)}, and {info.source} knows English only; leave it out or take a "
            "multilingual base."
        )
    raise ValueError(
        f"the tokenizer of {info.source} has no token for {shown(transcript.language)}, only for "
        f"{', '.join(known[:20])}."
    )


def _cut(whole: AudioText, longest_s: float) -> Iterator[AudioText]:
    """Yields the pieces of a long recording.

    Raises:
        ValueError: its transcript does not say where to cut it.
    """
    try:
        pieces = transcripts.segments(whole.transcript)
        if not pieces:
            raise ValueError("its transcript has no timestamps to split it at")
        if pieces[-1].end_s > whole.duration_s + 0.02:
            raise ValueError(f"its last timestamp is {pieces[-1].end_s:.2f}")
        for group in transcripts.join(pieces, longest_s):
            start, end = group[0].start_s, group[-1].end_s
            key = f"{whole.key}@{start:.2f}"
            yield replace(whole, key=key, start_s=start, duration_s=end - start, transcript=transcripts.shifted(group))
    except ValueError as error:
        raise ValueError(f"is {audio.clock(whole.duration_s)} long, but {error}; correct it or cut it.") from error


def _count_tokens(samples: list[AudioText], info: SpeechInfo, errors: list[str]) -> list[AudioText]:
    if info.count_tokens is None:
        return samples
    counted = []
    counts = info.count_tokens([sample.transcript for sample in samples])
    for sample, count in zip(samples, counts, strict=True):
        if isinstance(count, str):
            errors.append(f"{sample.key}: {count}")
        elif count > info.max_tokens:
            errors.append(
                f"{sample.key}: its transcript has {count} tokens, and the base writes at most {info.max_tokens}; "
                "cut it."
            )
        else:
            counted.append(replace(sample, num_tokens=count))
    return counted


def _report(samples: Sequence[AudioText], checked: Sequence[tuple[_Recording, Facts]], info: SpeechInfo) -> None:
    seconds = sum(sample.duration_s for sample in samples)
    num_whole = len({sample.key.removesuffix(f"@{sample.start_s:.2f}") for sample in samples})
    logger.info("Read %d recordings with transcripts, %s in all.", num_whole, audio.clock(seconds))
    if len(samples) > num_whole:
        logger.info("Split at timestamps into %d pieces.", len(samples))
    mixed = [recording.key for recording, facts in checked if facts.num_channels > 1]
    if mixed:
        logger.info("Mixed down to one channel: %d (%s).", len(mixed), name_some(mixed))
    resampled = [
        f"{recording.key} {facts.sampling_rate} Hz"
        for recording, facts in checked
        if facts.sampling_rate != info.sampling_rate
    ]
    if resampled:
        logger.info("Resampled to %d Hz: %d (%s).", info.sampling_rate, len(resampled), name_some(resampled))


def list_named(paths: Sequence[Path]) -> list[Path]:
    """Returns recordings, and those in folders; what is named twice stands there once.

    Raises:
        DataError: a folder holds none.
    """
    named: dict[Path, Path] = {}
    for path in paths:
        listed = preflight.list_recordings(str(path), "PATH").files if path.is_dir() else (path,)
        for file in listed:
            named.setdefault(file.parent.resolve() / file.name, file)
    return list(named.values())


def list_requests(paths: Sequence[Path], info: SpeechInfo) -> list[tuple[Path, Request]]:
    """Returns recordings as requests to write down what is said; long ones become several requests, in order.

    Args:
        paths: recordings, and folders of them; what is named twice is heard once.
        info: the base; how much it hears at once.

    Raises:
        DataError: lists all that cannot be heard.
    """
    files = list_named(paths)
    requests: list[tuple[Path, Request]] = []
    errors = []
    for file in files:
        try:
            requests += [(file, Request("", 0, sample=piece)) for piece in _pieces(file, info)]
        except RecordingError as error:
            errors.append(f"{file}: {error.reason}")
    if errors:
        raise DataError(f"{len(errors)} of {len(files)} recordings cannot be heard; correct or leave them out.", errors)
    return requests


def _pieces(file: Path, info: SpeechInfo) -> list[AudioText]:
    import torch

    if not file.is_file():
        raise RecordingError(str(file), "there is no such file; correct the path.")
    audio.check(file, audio.LONGEST_S)
    sound = audio.decode(file, info.sampling_rate)
    pieces = audio.windows(sound, info.sampling_rate, info.max_duration_s)
    if len(pieces) > 1:
        logger.info("%s: %s long, heard in %d pieces.", file, audio.clock(len(sound) / info.sampling_rate), len(pieces))
    starts = accumulate((len(piece) / info.sampling_rate for piece in pieces[:-1]), initial=0.0)
    return [
        AudioText(str(file), file, start_s=start, waveforms=(torch.from_numpy(piece),))
        for start, piece in zip(starts, pieces, strict=True)
    ]
