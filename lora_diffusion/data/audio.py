"""Recordings as training hears them: one channel at the base's sampling rate, decoded by libsndfile."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import not_a_file
from lora_diffusion.core.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".wav", ".flac", ".mp3", ".ogg", ".opus")
"""Files with these endings are taken for recordings, in any case."""
_SILENCE = 1e-3
"""A recording whose largest sample is below this, -60 dB, holds no speech."""
_SHORTEST_S = 0.1
_PLACEHOLDER_BYTES = 2**31 - 2**16
"""Size from which on a WAV file's header does not tell its length: programs that write into a pipe do not know it."""
_BLOCK_SAMPLES = 2**24
"""Of all channels together, decoded at once: 64 MiB. What can be trained on is one piece, since between two of them
soundfile seeks, after which decoders of mp3 and opus begin a little differently."""
_LONGEST_WHOLE = 2**25
"""Samples of a channel that are resampled in one piece, ten minutes; hours of them would take gigabytes."""

Content = Path | Callable[[], bytes]
"""A file, or what gives the content of one."""


class RecordingError(DataError):
    """A recording cannot be used."""

    def __init__(self, name: str, reason: str) -> None:
        """Keeps the reason by itself, for lists in which the file goes by another name."""
        self.reason = reason
        super().__init__(f"{name}: {reason}")


@dataclass(frozen=True)
class Facts:
    """What a recording is, besides its sound."""

    duration_s: float
    sampling_rate: int
    """In Hz, of the file."""
    num_channels: int
    digest: str
    """SHA-256 of the bytes."""


def decode(content: Content, sampling_rate: int, start_s: float = 0.0, duration_s: float | None = None) -> np.ndarray:
    """Returns the sound of a file, its channels mixed down to one, at a sampling rate.

    Args:
        content: the file.
        sampling_rate: in Hz; another one in the file is resampled by soxr at its high quality.
        start_s: where to begin, in seconds.
        duration_s: how long, in seconds; None goes to the end.

    Returns:
        [num_samples], float32 in about -1..1.

    Raises:
        RecordingError: it cannot be decoded.
    """
    soundfile, soxr = _packages()
    try:
        with _opened(content) as stream, soundfile.SoundFile(stream) as file:
            file.seek(round(start_s * file.samplerate))
            frames = file.frames - file.tell() if duration_s is None else round(duration_s * file.samplerate)
            rate, blocks = file.samplerate, _mono(file, frames)
            if rate == sampling_rate or frames <= _LONGEST_WHOLE:
                sound = np.concatenate([np.zeros(0, np.float32), *blocks])
                return sound if rate == sampling_rate else soxr.resample(sound, rate, sampling_rate)
            resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
            pieces = [resampler.resample_chunk(block) for block in blocks]
            return np.concatenate([*pieces, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise RecordingError(str(content), _explain(content, error)) from error


def _mono(file: Any, num_frames: int) -> Iterator[np.ndarray]:
    """Yields the next samples of a file in pieces, its channels mixed down to one; headers may promise too much."""
    at_once = max(_BLOCK_SAMPLES // file.channels, 1)
    while num_frames > 0:
        block = file.read(min(at_once, num_frames), dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block.mean(axis=1)
        num_frames -= len(block)


def check(content: Content, longest_s: float, remedy: str = "cut it") -> Facts:
    """Returns the facts of a recording that can be trained on, decoded in full.

    Args:
        content: the file.
        longest_s: seconds; longer ones are refused before they are decoded.
        remedy: what to do about those.

    Raises:
        RecordingError: it cannot be decoded, or is empty, silent or too long.
    """
    name = str(content)
    soundfile, _ = _packages()
    try:
        with _opened(content) as stream:
            digest, share = hashlib.file_digest(stream, "sha256").hexdigest(), _share_there(stream)
            stream.seek(0)
            with soundfile.SoundFile(stream) as file:
                _check_length(name, file.frames / file.samplerate, longest_s, remedy)
                told_s = file.frames / file.samplerate / share
                num_samples, is_finite, largest = _measure(_mono(file, file.frames))
                rate, num_channels = file.samplerate, file.channels
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise RecordingError(name, _explain(content, error)) from error
    if num_samples < 0.99 * told_s * rate:
        raise RecordingError(
            name, f"breaks off after {num_samples / rate:.1f} of {told_s:.1f} s; copy or export it again."
        )
    if not is_finite:
        raise RecordingError(name, "holds samples that are not numbers; export it again.")
    if largest < _SILENCE:
        raise RecordingError(name, "is silent (nothing above -60 dB); record it again or move it away.")
    return Facts(num_samples / rate, rate, num_channels, digest)


def _check_length(name: str, duration_s: float, longest_s: float, remedy: str) -> None:
    if duration_s < _SHORTEST_S:
        raise RecordingError(name, f"holds {duration_s:.2f} s of sound; record it again or move it away.")
    if duration_s > longest_s:
        raise RecordingError(
            name, f"is {clock(duration_s)} long, and at most {clock(longest_s)} can be used; {remedy}."
        )


def _measure(blocks: Iterable[np.ndarray]) -> tuple[int, bool, float]:
    """Returns the number of samples, whether all are numbers, and the largest amplitude."""
    num_samples, is_finite, largest = 0, True, 0.0
    for block in blocks:
        num_samples += len(block)
        is_finite = is_finite and bool(np.isfinite(block).all())
        largest = max(largest, float(np.abs(block).max()))
    return num_samples, is_finite, largest


def at_speed(sound: np.ndarray, speed: float, sampling_rate: int) -> np.ndarray:
    """Returns the sound played faster or slower, its pitch with it, by resampling.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", section 2.
    """
    _, soxr = _packages()
    return sound if speed == 1 else soxr.resample(sound, sampling_rate * speed, sampling_rate)


def with_noise(sound: np.ndarray, ratio_db: float) -> np.ndarray:
    """Returns the sound with white noise at a signal-to-noise ratio; equal arguments give equal noise."""
    import torch

    rng = derive(0, "noise", len(sound), f"{ratio_db:g}")
    scale = float(np.sqrt(np.mean(sound**2)) * 10 ** (-ratio_db / 20))
    noise: Tensor = torch.randn(len(sound), generator=rng)
    return sound + scale * noise.numpy()


def windows(sound: np.ndarray, sampling_rate: int, longest_s: float) -> list[np.ndarray]:
    """Returns a long recording in pieces of at most `longest_s`, cut where the last third of each is quietest."""
    longest, step = int(longest_s * sampling_rate), sampling_rate // 50
    pieces = []
    while len(sound) > longest:
        start = longest * 2 // 3
        candidates = sound[start : start + (longest - start) // step * step]
        loudness = np.square(candidates).reshape(-1, step).mean(axis=1)
        cut = start + int(loudness.argmin()) * step + step // 2
        pieces.append(sound[:cut])
        sound = sound[cut:]
    return [*pieces, sound]


def clock(seconds: float) -> str:
    """Returns a duration as people write it.

    >>> clock(4.25), clock(7261)
    ('4.2 s', '2:01:01')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min"


def _packages() -> tuple[Any, Any]:
    return require("soundfile", "Reading recordings"), require("soxr", "Resampling recordings")


def _opened(content: Content) -> BinaryIO:
    """Returns the bytes as a stream; raises RecordingError where the file cannot be opened, or is a pipe or device."""
    if callable(content):
        return io.BytesIO(content())
    if kind := not_a_file(content):
        raise RecordingError(str(content), f"is {kind} and no file; move it away.")
    try:
        return content.open("rb")
    except OSError as error:
        raise RecordingError(
            str(content), f"cannot be read ({error.strerror}); correct its access rights or link."
        ) from error


def _share_there(stream: BinaryIO) -> float:
    """Returns how much of a WAV file is there by its header, at most 1; libsndfile takes what there is for all."""
    num_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    start = stream.read(8)
    told = 8 + int.from_bytes(start[4:8], "little")
    return num_bytes / told if start[:4] == b"RIFF" and num_bytes < told < _PLACEHOLDER_BYTES else 1.0


def _explain(content: Content, error: Exception) -> str:
    size = len(content()) if callable(content) else content.stat().st_size
    if size == 0:
        return "is empty (0 bytes); replace it or move it away."
    # The whole message of libsndfile names the stream by its address.
    reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
    kinds = ", ".join(ENDINGS)
    return f"cannot be decoded ({reason}); it is damaged or of a kind that is not read, export it as one of {kinds}."
