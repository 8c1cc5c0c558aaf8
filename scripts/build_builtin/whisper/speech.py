"""Stage 1: spoken digits and commands, synthesised by espeak-ng; stored as log-mel features."""

import argparse
import io
import random
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from transformers import WhisperFeatureExtractor

from scripts.build_builtin.storage import save_checkpoint

SAMPLING_RATE = 16000
CHUNK_S = 3
"""What the model hears at once, in seconds."""
MOST_WORDS = 3
"""In an utterance: four words of a slow voice do not fit."""
NUM_TRAINING = 10000
NUM_VALIDATION = 300
"""Utterances that are drawn; those of more words are left out."""

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_COMMANDS = """yes no up down left right on off stop go start play pause next back open close door window light music
louder quieter red green blue call send read home"""
COMMANDS = _COMMANDS.split()
HELD_OUT_WORDS = ["cancel", "mirror", "garden", "purple", "silver", "kettle", "record", "repeat", "kitchen", "volume"]

ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
HELD_OUT_ACCENT = "en-gb-scotland"
VARIANTS = ("", "+m1", "+m2", "+m3", "+m4", "+m5", "+m7", "+f1", "+f2", "+f3", "+f4", "+f5", "+grandma", "+grandpa")
"""Voices of espeak-ng besides the plain one of an accent."""


@dataclass(frozen=True)
class Utterance:
    """What is said and how: all that a recording depends on."""

    words: tuple[str, ...]
    voice: str
    pitch: int
    """0 to 99."""
    speed: int
    """Words per minute."""
    noise: float
    """Standard deviation of white noise, of full scale."""
    lead_s: float
    """Silence before the first word, in seconds."""

    @property
    def text(self) -> str:
        """The transcript."""
        return " ".join(self.words)


def draw(rng: random.Random, words: Sequence[str], accents: Sequence[str], most: int = MOST_WORDS + 1) -> Utterance:
    """An utterance of one to `most` of the words in one of the accents."""
    count = rng.randint(1, most)
    return Utterance(
        tuple(rng.choice(words) for _ in range(count)),
        rng.choice(accents) + rng.choice(VARIANTS),
        rng.randint(25, 75),
        rng.randint(130, 190),
        rng.choice((0.0, 0.001, 0.004)),
        rng.uniform(0.0, 0.4),
    )


def speak(utterance: Utterance) -> np.ndarray:
    """The sound, float32 in -1..1 at 16 kHz; its noise depends on the utterance only."""
    command = ["espeak-ng", "-v", utterance.voice, "-p", str(utterance.pitch), "-s", str(utterance.speed), "--stdout"]
    wave = subprocess.run([*command, utterance.text], capture_output=True, check=True).stdout
    # A streamed WAV file says it is longer than it is; libsndfile reads what is there.
    sound, rate = soundfile.read(io.BytesIO(wave), dtype="float32")
    sound = soxr.resample(sound, rate, SAMPLING_RATE)
    sound = np.concatenate([np.zeros(round(utterance.lead_s * SAMPLING_RATE), np.float32), sound])
    noise = np.random.default_rng(abs(hash_of(utterance)) % 2**32).normal(0, 1, len(sound)).astype(np.float32)
    return (sound + utterance.noise * noise)[: CHUNK_S * SAMPLING_RATE]


def hash_of(utterance: Utterance) -> int:
    """A number that is the same on every machine."""
    return int.from_bytes(repr(utterance).encode(), "little") % (2**61 - 1)


def make_extractor() -> WhisperFeatureExtractor:
    """Whisper's own features, of a shorter time."""
    return WhisperFeatureExtractor(chunk_length=CHUNK_S)


def utterances(name: str) -> list[Utterance]:
    """Those of "training" or "validation": seen words, seen accents."""
    rng = random.Random(name)
    count = {"training": NUM_TRAINING, "validation": NUM_VALIDATION}[name]
    # Digits are a quarter of the words and half of what is said.
    drawn = [draw(rng, rng.choice((DIGITS, COMMANDS, DIGITS + COMMANDS)), ACCENTS) for _ in range(count)]
    return [one for one in drawn if len(one.words) <= MOST_WORDS]


def features(sounds: Iterable[np.ndarray]) -> torch.Tensor:
    """[n, 80, frames], half precision."""
    extractor = make_extractor()
    rows = [
        torch.from_numpy(extractor(sound, sampling_rate=SAMPLING_RATE, return_tensors="np").input_features).half()
        for sound in sounds
    ]
    return torch.cat(rows)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/whisper"))
    work = parser.parse_args().work
    torch.set_num_threads(1)
    for name in ("validation", "training"):
        spoken = utterances(name)
        state = {"features": features(map(speak, spoken)), "texts": [one.text for one in spoken]}
        save_checkpoint(work / f"{name}.pt", state)
        print(f"{name}: {len(spoken)} utterances, {sum(len(one.words) for one in spoken)} words", flush=True)


if __name__ == "__main__":
    main()
