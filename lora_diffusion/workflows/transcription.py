"""What a base, with or without adapters, hears in recordings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import ModelOptions, RecordingDataConfig
from lora_diffusion.core.device import pick_device
from lora_diffusion.core.protocols import Family
from lora_diffusion.core.tuning import use_threads
from lora_diffusion.core.types import AdapterState, AudioText, Loaded, Output, Request, SpeechInfo
from lora_diffusion.data.listening import list_requests
from lora_diffusion.data.recordings import KIND
from lora_diffusion.data.splits import ALL
from lora_diffusion.data.transcripts import Segment, cues, later, without_timestamps
from lora_diffusion.evaluation.transcripts import Understanding, judge, normaliser
from lora_diffusion.workflows._steps import attach, find_family, read_adapter

Adapters = Sequence[tuple[Path, float]]
_EVERYTHING = RecordingDataConfig(split=ALL)
"""To score on, all of a folder is taken, since its user chose it for that."""


@dataclass(frozen=True)
class Transcription:
    """What was heard in one recording."""

    path: Path
    text: str
    segments: tuple[Segment, ...] = ()
    """The words with when they were said: as timestamps tell it, else for each piece in which they were heard."""


def transcribe(model: ModelOptions, paths: Sequence[Path], adapters: Adapters = ()) -> list[Transcription]:
    """Returns what is said in recordings; those that are too long to be heard at once are heard in pieces.

    Args:
        model: a base that listens.
        paths: recordings, and folders of them.
        adapters: files or folders with their weights; all are applied at once.

    Raises:
        InputError: the base, an adapter or a recording cannot be used; all faults of recordings are listed at once.
    """
    family, info, states = _open(model, adapters)
    asked = list_requests(paths, info)
    loaded, weights = _load(family, model, states, adapters)
    requests = [replace(request, weights=weights or None) for _, request in asked]
    texts: dict[Path, list[str]] = {}
    segments: dict[Path, list[Segment]] = {}
    for (path, request), output in zip(asked, family.generate(loaded, requests), strict=True):
        sample = request.sample
        assert isinstance(sample, AudioText), "requests to transcribe hold a recording"
        text = later(output.text, sample.start_s)
        texts.setdefault(path, []).append(text)
        end_s = sample.start_s + len(sample.waveforms[0]) / info.sampling_rate
        segments.setdefault(path, []).extend(cues(text, sample.start_s, end_s))
    return [Transcription(path, " ".join(pieces), tuple(segments[path])) for path, pieces in texts.items()]


def understand(
    model: ModelOptions,
    data_paths: Sequence[Path],
    adapters: Adapters = (),
    data: RecordingDataConfig = _EVERYTHING,
) -> list[Understanding]:
    """Compares what is heard in folders of recordings with their transcripts; one result for each folder.

    Args:
        model: a base that listens.
        data_paths: folders, as `data.path` takes them.
        adapters: files or folders with their weights; all are applied at once.
        data: how they are read, all but their path and the views of the sound.

    Raises:
        InputError: the base, an adapter or the data cannot be used.
    """
    family, info, states = _open(model, adapters)
    plain = replace(data, speeds=RecordingDataConfig.speeds, noise_db=())
    sets = [KIND.read(replace(plain, path=str(path)), info) for path in data_paths]
    loaded, weights = _load(family, model, states, adapters)
    generate = partial(family.generate, loaded)
    return [compare(generate, loaded, samples, weights or None) for samples in sets]


def compare(
    generate: Callable[[Sequence[Request]], Sequence[Output]],
    loaded: Loaded,
    samples: Sequence[AudioText],
    weights: Mapping[str, float] | None = None,
) -> Understanding:
    """Compares what a loaded base hears with the transcripts; without weights, adapters are as they are now."""
    opened = [KIND.open(sample, RecordingDataConfig()) for sample in samples]
    outputs = generate([Request("", 0, weights=weights, sample=one) for one in opened])
    said = [without_timestamps(sample.transcript) for sample in samples]
    heard = [without_timestamps(output.text) for output in outputs]
    languages = [_written(sample, loaded.options) for sample in samples]
    normalisers = {language: normaliser(language, loaded.info.path) for language in set(languages)}
    normalise = [normalisers[language] for language in languages]
    return judge([sample.key for sample in samples], said, heard, normalise)


def _written(sample: AudioText, options: Any) -> str:
    """Returns the language of a transcript; translations are into English."""
    language, task = sample.asked(options)
    return "en" if task == "translate" else language


def _open(model: ModelOptions, adapters: Adapters) -> tuple[Family, SpeechInfo, list[AdapterState]]:
    family = find_family(model, AudioText)
    info = family.check(model)
    assert isinstance(info, SpeechInfo), "a family of recordings describes its base so"
    return family, info, [read_adapter(path, family, model) for path, _ in adapters]


def _load(
    family: Family, model: ModelOptions, states: Sequence[AdapterState], adapters: Adapters
) -> tuple[Loaded, dict[str, float]]:
    use_threads("auto")
    loaded = family.load(model, pick_device())
    return loaded, attach(loaded, states, [weight for _, weight in adapters])
