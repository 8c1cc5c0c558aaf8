"""Recordings that are only listened to, whole or in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from lora_diffusion.core.base_model import SpeechInfo
from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import AudioText, Request
from lora_diffusion.data import audio, preflight
from lora_diffusion.data.audio import RecordingError


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
