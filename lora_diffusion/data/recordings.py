"""Recordings with transcripts, as a kind of samples."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import PreviewConfig, RecordingDataConfig
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import user_path
from lora_diffusion.core.keymap import suggestion
from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.core.types import AudioText, Request, SpeechInfo
from lora_diffusion.data import audio, preflight, transcripts
from lora_diffusion.data._progress import watch
from lora_diffusion.data.audio import Facts, RecordingError
from lora_diffusion.data.folder import Folder, stop
from lora_diffusion.data.transcripts import Transcript

_NUM_THREADS = 4
_NUM_AT_ONCE = 8
_NUM_PREVIEWS = 4
_LONGEST_FILE_S = 4 * 3600
"""Recordings of more than this are never read, not even to be split."""
_SAVED_BY_DATASETS = "dataset_info.json"


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


class _Recordings:
    """See `data.kinds.Kind` for what each method must do."""

    noun = "recordings"

    def read(self, config: RecordingDataConfig, info: SpeechInfo) -> list[AudioText]:
        """Reads a folder, or a data set that was saved to the disk, and decodes every recording once."""
        is_table = (user_path(config.path, "data.path") / _SAVED_BY_DATASETS).is_file()
        folder, recordings, faults = (_list_saved if is_table else _list_files)(config)
        checked = _check_all(folder, recordings, config, info, faults)
        unreadable = 0 if config.skip_bad else len(recordings) - len(checked)
        samples = []
        for recording, facts in checked:
            samples += _samples(recording, facts, config, info, faults)
        samples = _count_tokens(samples, info, faults)
        stop(folder, "transcripts", faults, unreadable)
        _tell(samples, checked, info)
        return samples

    def identity(self, sample: AudioText, config: RecordingDataConfig) -> list[Any]:
        """Names the sound by its bytes and the views of it, and what is said."""
        return [*self.view_identity(sample, config), *self.text_identity(sample)]

    def view_identity(self, sample: AudioText, config: RecordingDataConfig) -> list[Any]:
        """Names the sound by its bytes, and the views of it."""
        data = sample.read_bytes() if sample.read_bytes else sample.path.read_bytes()
        place = [sample.start_s, sample.duration_s, sample.sampling_rate, config.speeds, config.noise_db]
        return [hashlib.sha256(data).hexdigest(), *place]

    def text_identity(self, sample: AudioText) -> list[Any]:
        """Names what is said, its language and the task."""
        return [sample.transcript, sample.language, sample.task]

    def open(self, sample: AudioText, config: RecordingDataConfig) -> AudioText:
        """Decodes the recording at each speed, clean and with each noise."""
        import torch

        content = sample.read_bytes or sample.path
        sound = audio.decode(content, sample.sampling_rate, sample.start_s, sample.duration_s)
        views = []
        for speed in config.speeds:
            clean = audio.at_speed(sound, speed, sample.sampling_rate)
            views += [clean, *(audio.with_noise(clean, ratio) for ratio in config.noise_db)]
        return replace(sample, waveforms=tuple(torch.from_numpy(view).float() for view in views))

    def group(self, sample: AudioText) -> str:
        """Names none: the base pads every recording to the same length."""
        del sample
        return ""

    def num_at_once(self, sample: AudioText, config: RecordingDataConfig) -> int:
        """Limits the views of all samples together."""
        del sample
        return max(_NUM_AT_ONCE // (len(config.speeds) * (1 + len(config.noise_db))), 1)

    def describe(self, samples: Sequence[AudioText]) -> RecordingReport:
        """Counts seconds, words and languages."""
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

    def largest(self, samples: Sequence[AudioText]) -> tuple[int, int]:
        """Gives the longest recording in samples, and the longest transcript in tokens."""
        longest_s = max(sample.duration_s for sample in samples)
        return round(longest_s * samples[0].sampling_rate), max(sample.num_tokens for sample in samples)

    def previews(self, samples: Sequence[AudioText], config: PreviewConfig) -> list[Request]:
        """Asks for the recordings that `preview.prompts` names by their keys, or for the first."""
        named = {sample.key: sample for sample in samples}
        unknown = [key for key in config.prompts if key not in named]
        if unknown:
            raise ConfigError(
                f"preview.prompts: the data has no recording {', '.join(unknown)}{suggestion(unknown[0], named)}; name "
                "those to transcribe as they are called below data.path."
            )
        chosen = [named[key] for key in config.prompts] or list(samples[:_NUM_PREVIEWS])
        return [Request("", 0, sample=self.open(sample, RecordingDataConfig())) for sample in chosen]

    def metadata(self, samples: Sequence[AudioText], config: RecordingDataConfig) -> dict[str, Any]:
        """Tells the seconds of sound and the views of it."""
        seconds = round(sum(sample.duration_s for sample in samples), 1)
        return {"audio_seconds": seconds, "audio_speeds": config.speeds, "audio_noise_db": config.noise_db or None}

    def headline(self, samples: Sequence[AudioText]) -> dict[str, Any]:
        """Gives nothing."""
        del samples
        return {}

    def texts(self, sample: AudioText) -> tuple[str, ...]:
        """Gives none: what people said is nobody else's business."""
        del sample
        return ()


@dataclass(frozen=True)
class _Recording:
    key: str
    path: Path
    transcript: Transcript
    read_bytes: Callable[[], bytes] | None = None


def _list_files(config: RecordingDataConfig) -> tuple[Folder, list[_Recording], list[str]]:
    folder = preflight.list_recordings(config.path)
    faults: list[str] = []
    texts = transcripts.collect(folder, faults)
    preflight.warn_of_orphans(folder, "transcript", (transcripts.BESIDE,))
    lacking = [path for path in folder.files if path not in texts]
    if len(lacking) == len(folder.files) and not faults:  # else what is wrong with the table is the reason
        faults.append(
            f"None of the {len(lacking)} recordings has a transcript: write it into name.txt beside name.wav, or into "
            "a metadata.csv with the columns file_name and transcription."
        )
    elif len(lacking) < len(folder.files):
        faults += [f"{folder.name(path)}: has no transcript; write {path.stem}.txt beside it." for path in lacking]
    faults += [
        f"{folder.name(path)}: its transcript in {told.origin} is empty; write one."
        for path, told in texts.items()
        if told and not transcripts.without_timestamps(told.text)
    ]
    nothing = Transcript("")
    return folder, [_Recording(folder.name(p), p, texts.get(p) or nothing) for p in folder.files], faults


def _list_saved(config: RecordingDataConfig) -> tuple[Folder, list[_Recording], list[str]]:
    datasets = require("datasets", "Reading a data set that was saved to the disk")
    root = user_path(config.path, "data.path")
    table = datasets.load_from_disk(str(root))
    column = next((name for name in transcripts.FILE_KEYS if name in getattr(table, "column_names", ())), None)
    if column is None:
        raise DataError(
            f"data.path={config.path} is a saved data set without a column {', '.join(transcripts.FILE_KEYS)}, or with "
            "several splits; give the folder of one split that holds recordings."
        )
    table = table.cast_column(column, datasets.Audio(decode=False))
    texts, faults, recordings = table.remove_columns(column), [], []
    for index in range(len(table)):
        name = f"row {index}"
        try:
            transcript = transcripts.of_row(texts[index], name)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        if not transcripts.without_timestamps(transcript.text):
            faults.append(f"{name}: its transcript is empty; write one.")
        recordings.append(_Recording(name, root, transcript, partial(_content, table, index, column)))
    return Folder(root, "recordings", tuple(root / recording.key for recording in recordings), ()), recordings, faults


def _content(table: Any, index: int, column: str) -> bytes:
    cell = table[index][column]
    content: bytes = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    return content


def _check_all(
    folder: Folder,
    recordings: Sequence[_Recording],
    config: RecordingDataConfig,
    info: SpeechInfo,
    faults: list[str],
) -> list[tuple[_Recording, Facts]]:
    """Returns the recordings that can be used, with their facts; the others are faults or, if asked for, left out."""
    longest_s = info.max_duration_s * min(config.speeds)
    remedy = "cut it, or set data.long=split if its transcript has timestamps"
    if config.long == "split":
        longest_s, remedy = _LONGEST_FILE_S, "cut it"

    def check(recording: _Recording) -> Facts | str:
        try:
            return audio.check(recording.read_bytes or recording.path, longest_s, remedy)
        except RecordingError as error:
            return error.reason

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        found = list(watch(pool.map(check, recordings), len(recordings), f"Checking {folder.noun}"))
    pairs = list(zip(recordings, found, strict=True))
    good = [(recording, facts) for recording, facts in pairs if not isinstance(facts, str)]
    bad = {recording.key: reason for recording, reason in pairs if isinstance(reason, str)}
    if bad and config.skip_bad and good:
        logger.warning("Left out recordings that cannot be used: %d (%s).", len(bad), name_some(list(bad)))
    else:
        faults.extend(f"{key}: {reason}" for key, reason in bad.items())
    return good


def _samples(
    recording: _Recording, facts: Facts, config: RecordingDataConfig, info: SpeechInfo, faults: list[str]
) -> Iterator[AudioText]:
    told = recording.transcript
    if told.language and told.language not in info.languages:
        known = (
            f"only for {', '.join(info.languages[:20])}" if info.languages else "for none: it knows one language only"
        )
        faults.append(f"{recording.key}: the tokenizer of {info.source} has no token for {told.language}, {known}.")
    whole = AudioText(
        key=recording.key,
        path=recording.path,
        transcript=told.text,
        language=told.language,
        task=told.task,
        duration_s=facts.duration_s,
        sampling_rate=info.sampling_rate,
        read_bytes=recording.read_bytes,
    )
    longest_s = info.max_duration_s * min(config.speeds)
    if facts.duration_s <= longest_s:
        yield whole
        return
    try:
        pieces = transcripts.segments(told.text)
        if not pieces:
            raise ValueError("its transcript has no timestamps to split it at")
        if pieces[-1].end_s > facts.duration_s + 0.02:
            raise ValueError(f"its last timestamp is {pieces[-1].end_s:.2f}")
        for group in transcripts.join(pieces, longest_s):
            start, end = group[0].start_s, group[-1].end_s
            key = f"{recording.key}@{start:.2f}"
            yield replace(whole, key=key, start_s=start, duration_s=end - start, transcript=transcripts.shifted(group))
    except ValueError as error:
        faults.append(f"{recording.key}: is {audio.clock(facts.duration_s)} long, but {error}; correct it or cut it.")


def _count_tokens(samples: list[AudioText], info: SpeechInfo, faults: list[str]) -> list[AudioText]:
    if info.count_tokens is None:
        return samples
    counts = info.count_tokens([sample.transcript for sample in samples])
    for sample, count in zip(samples, counts, strict=True):
        if count > info.max_tokens:
            faults.append(
                f"{sample.key}: its transcript has {count} tokens, and the base writes at most {info.max_tokens}; "
                "cut it."
            )
    return [replace(sample, num_tokens=count) for sample, count in zip(samples, counts, strict=True)]


def _tell(samples: Sequence[AudioText], checked: Sequence[tuple[_Recording, Facts]], info: SpeechInfo) -> None:
    seconds = sum(sample.duration_s for sample in samples)
    logger.info("Read %d recordings with transcripts, %s in all.", len(checked), audio.clock(seconds))
    if len(samples) > len(checked):
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


def list_requests(paths: Sequence[Path], info: SpeechInfo) -> list[tuple[Path, Request]]:
    """Returns recordings as requests to write down what is said; long ones become several requests, in order.

    Args:
        paths: recordings, and folders of them; what is named twice is heard once.
        info: the base; how much it hears at once.

    Raises:
        DataError: lists all that cannot be heard.
    """
    named: dict[Path, Path] = {}
    for path in paths:
        listed = preflight.list_recordings(str(path)).files if path.is_dir() else (path,)
        for file in listed:
            named.setdefault(file.parent.resolve() / file.name, file)
    files = list(named.values())
    found: list[tuple[Path, Request]] = []
    faults = []
    for file in files:
        try:
            found += [(file, Request("", 0, sample=piece)) for piece in _pieces(file, info)]
        except RecordingError as error:
            faults.append(f"{file}: {error.reason}")
    if faults:
        raise DataError(f"{len(faults)} of {len(files)} recordings cannot be heard; correct or leave them out.", faults)
    return found


def _pieces(file: Path, info: SpeechInfo) -> list[AudioText]:
    import torch

    if not file.is_file():
        raise RecordingError(str(file), "there is no such file; correct the path.")
    audio.check(file, _LONGEST_FILE_S)
    sound = audio.decode(file, info.sampling_rate)
    pieces = audio.windows(sound, info.sampling_rate, info.max_duration_s)
    if len(pieces) > 1:
        logger.info("%s: %s long, heard in %d pieces.", file, audio.clock(len(sound) / info.sampling_rate), len(pieces))
    starts = accumulate((len(piece) / info.sampling_rate for piece in pieces[:-1]), initial=0.0)
    return [
        AudioText(str(file), file, start_s=start, waveforms=(torch.from_numpy(piece),))
        for start, piece in zip(starts, pieces, strict=True)
    ]


KIND = _Recordings()
