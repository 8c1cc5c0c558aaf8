"""Recordings as training hears them: one channel at the base's sampling rate.

libsndfile decodes sound files; MP4, Matroska and AAC, which phones, browsers and cameras write, are left to PyAV.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diffusion.core.errors import DataError, UnsupportedError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import not_a_file
from lora_diffusion.core.rng import derive

if TYPE_CHECKING:
    from torch import Tensor

_SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".caf")
_CONTAINERS = (".m4a", ".m4b", ".mp4", ".mov", ".webm", ".weba", ".mka", ".mkv", ".aac")
ENDINGS = (*_SOUND_FILES, *_CONTAINERS)
"""Files with these endings are taken for recordings, in any case; what decodes them, their content decides."""
_SILENCE = 1e-3
"""A recording whose largest sample is below this, -60 dB, holds no speech."""
_SHORTEST_S = 0.1
LONGEST_S = 4 * 3600
"""Recordings of more than this are never read, not even to be split."""
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
    if _is_container(content):
        sound, rate, _ = _decode_container(str(content), _bytes(content))
        start = round(start_s * rate)
        stop = None if duration_s is None else start + round(duration_s * rate)
        return _resampled(sound[start:stop].mean(axis=1), rate, sampling_rate)
    try:
        with _opened(content) as stream, soundfile.SoundFile(stream) as file:
            file.seek(round(start_s * file.samplerate))
            frames = file.frames - file.tell() if duration_s is None else round(duration_s * file.samplerate)
            rate, blocks = file.samplerate, _mono(file, frames)
            if rate == sampling_rate or frames <= _LONGEST_WHOLE:
                sound = np.concatenate([np.zeros(0, np.float32), *blocks])
                return _resampled(sound, rate, sampling_rate)
            resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
            pieces = [resampler.resample_chunk(block) for block in blocks]
            return np.concatenate([*pieces, resampler.resample_chunk(np.zeros(0, np.float32), last=True)])
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise RecordingError(str(content), _explain(content, error)) from error


def _resampled(sound: np.ndarray, rate: float, sampling_rate: float) -> np.ndarray:
    """Returns a sound, [num_samples], at another sampling rate, by soxr at its high quality."""
    if rate == sampling_rate:
        return sound
    _, soxr = _packages()
    resampled: np.ndarray = soxr.resample(sound, rate, sampling_rate)
    return resampled


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
    check_length = partial(_check_length, name, longest_s, remedy)
    if _is_container(content):
        data = _bytes(content)
        sound, rate, announced_s = _decode_container(name, data, check_length)
        digest, num_channels = hashlib.sha256(data).hexdigest(), sound.shape[1]
        num_samples, is_finite, largest = _measure([sound.mean(axis=1)])
        check_length(num_samples / rate)
    else:
        digest, rate, num_channels, announced_s, sizes = _look_through(content, check_length)
        num_samples, is_finite, largest = sizes
    if num_samples < 0.99 * announced_s * rate:
        raise RecordingError(
            name, f"breaks off after {num_samples / rate:.1f} of {announced_s:.1f} s; copy or export it again."
        )
    if not is_finite:
        raise RecordingError(name, "holds samples that are not numbers; export it again.")
    if largest < _SILENCE:
        raise RecordingError(name, "is silent (nothing above -60 dB); record it again or move it away.")
    return Facts(num_samples / rate, rate, num_channels, digest)


def _check_length(name: str, longest_s: float, remedy: str, duration_s: float) -> None:
    if duration_s < _SHORTEST_S:
        raise RecordingError(name, f"holds {duration_s:.2f} s of sound; record it again or move it away.")
    if duration_s > longest_s:
        raise RecordingError(
            name, f"is {clock(duration_s)} long, and at most {clock(longest_s)} can be used; {remedy}."
        )


def _look_through(
    content: Content, check_length: Callable[[float], None]
) -> tuple[str, int, int, float, tuple[int, bool, float]]:
    """Returns hash, sampling rate, number of channels, the seconds that the file announces, and what `_measure` gives.

    A file is read in pieces, so that hours of sound take no memory.
    """
    soundfile, _ = _packages()
    try:
        with _opened(content) as stream:
            digest, share = hashlib.file_digest(stream, "sha256").hexdigest(), _share_there(stream)
            stream.seek(0)
            with soundfile.SoundFile(stream) as file:
                check_length(file.frames / file.samplerate)
                announced_s = file.frames / file.samplerate / share
                return digest, file.samplerate, file.channels, announced_s, _measure(_mono(file, file.frames))
    except (soundfile.LibsndfileError, OSError, RuntimeError) as error:
        raise RecordingError(str(content), _explain(content, error)) from error


def _measure(blocks: Iterable[np.ndarray]) -> tuple[int, bool, float]:
    """Returns the number of samples, whether all are numbers, and the largest amplitude."""
    num_samples, is_finite, largest = 0, True, 0.0
    for block in filter(len, blocks):  # a damaged file may announce more than it gives
        num_samples += len(block)
        is_finite = is_finite and bool(np.isfinite(block).all())
        largest = max(largest, float(np.abs(block).max()))
    return num_samples, is_finite, largest


def _is_container(content: Content) -> bool:
    """Says whether a file is MP4 or QuickTime, Matroska or WebM, or AAC as it is streamed, by its first bytes."""
    with _opened(content) as stream:
        head = stream.read(8)
    is_aac = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    return is_aac or head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide") or head[:4] == b"\x1aE\xdf\xa3"


def _decode_container(
    name: str, data: bytes, check_length: Callable[[float], None] | None = None
) -> tuple[np.ndarray, int, float]:
    """Returns the first sound track, [num_samples, channels] float32, its sampling rate, and the seconds it announces.

    Args:
        name: for messages.
        data: the file.
        check_length: refuses a length before anything is decoded.

    Raises:
        RecordingError: it cannot be decoded, or PyAV is not installed.
    """
    try:
        av = require("av", "Reading MP4, WebM and AAC recordings")
    except UnsupportedError as error:
        raise RecordingError(name, f"is MP4, WebM or AAC. {error}, or convert it to flac.") from error
    try:
        with av.open(io.BytesIO(data)) as container:
            if not container.streams.audio:
                raise RecordingError(name, "holds no sound track; move it away.")
            announced_s = _announced_s(container)
            if check_length and announced_s:
                check_length(announced_s)
            to_floats = av.AudioResampler(format="fltp")
            frames = [piece for frame in container.decode(audio=0) for piece in to_floats.resample(frame)]
            frames += to_floats.resample(None)
            rate = container.streams.audio[0].rate
    except (av.FFmpegError, ValueError) as error:
        raise RecordingError(name, _explain(lambda: data, error)) from error
    pieces = [frame.to_ndarray().T for frame in frames]
    return np.concatenate(pieces) if pieces else np.zeros((0, 1), np.float32), rate, announced_s


def _announced_s(container: Any) -> float:
    """Returns how long the sound is for sure by its header, 0 where that does not tell.

    Tracks of a video may differ in length, AAC that is streamed is estimated, and browsers write no length.
    """
    is_vague = container.streams.video or container.format.name == "aac" or not container.duration
    # Encoders add up to some thousand samples that are cut off again.
    return 0.0 if is_vague else max(container.duration / 1e6 - 0.1, 0.0)


def at_speed(sound: np.ndarray, speed: float, sampling_rate: int) -> np.ndarray:
    """Returns the sound played faster or slower, its pitch with it, by resampling.

    Source: Ko et al. 2015, "Audio augmentation for speech recognition", section 2.
    """
    return _resampled(sound, sampling_rate * speed, sampling_rate)


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


class _Stream(io.BufferedReader):
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Stays where it is where damage asks for a place before the start.

        soundfile calls this from C, where an error would be printed with a traceback and be no end; what libsndfile
        then reads it refuses.
        """
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return self.tell()


def _opened(content: Content) -> io.BufferedReader:
    """Returns the bytes as a stream; raises RecordingError where the file cannot be opened, or is a pipe or device."""
    if callable(content):
        return _Stream(io.BytesIO(content()))  # type: ignore[arg-type]  # it reads as raw streams do
    if file_type := not_a_file(content):
        raise RecordingError(str(content), f"is {file_type} and no file; move it away.")
    try:
        return _Stream(io.FileIO(content))
    except OSError as error:
        raise RecordingError(
            str(content), f"cannot be read ({error.strerror}); correct its access rights or link."
        ) from error


def _bytes(content: Content) -> bytes:
    with _opened(content) as stream:
        return stream.read()


def _share_there(stream: io.BufferedReader) -> float:
    """Returns how much of a WAV file is there by its header, at most 1; libsndfile takes what there is for all."""
    num_bytes = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    start = stream.read(8)
    num_announced = 8 + int.from_bytes(start[4:8], "little")
    return num_bytes / num_announced if start[:4] == b"RIFF" and num_bytes < num_announced < _PLACEHOLDER_BYTES else 1.0


def _explain(content: Content, error: Exception) -> str:
    size = len(content()) if callable(content) else content.stat().st_size
    if size == 0:
        return "is empty (0 bytes); replace it or move it away."
    # The whole message of libsndfile names the stream by its address.
    reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
    formats = ", ".join(_SOUND_FILES[:5])
    return (
        f"cannot be decoded ({reason}); it is damaged or of a format that is not read, export it as one of {formats}."
    )
