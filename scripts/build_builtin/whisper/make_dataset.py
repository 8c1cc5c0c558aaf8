"""Stage 3: datasets/spoken-digits, the accent and the words that the model has never heard."""

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch

from scripts.build_builtin.storage import replace_folder
from scripts.build_builtin.whisper.speech import (
    ACCENTS,
    COMMANDS,
    DIGITS,
    HELD_OUT_ACCENT,
    HELD_OUT_WORDS,
    MOST_WORDS,
    SAMPLING_RATE,
    Utterance,
    draw,
    speak,
)

DEFAULT_OUTPUT = Path(__file__).parents[3] / "datasets" / "spoken-digits"
NUM_NEW, NUM_KEPT, NUM_TESTS = 160, 400, 40
"""Recordings to train on that are new, those of what the base knows already, and those of each test."""
_SEEN = (*DIGITS, *COMMANDS)
_README = f"""# spoken-digits

Digits and short commands, spoken by a synthesiser, for trying what an adapter teaches a Whisper: `builtin:digits` has
never heard the accent `{HELD_OUT_ACCENT}`, nor the words {", ".join(HELD_OUT_WORDS)}.

| folder | recordings | accent | words |
|---|---|---|---|
| `train` | {NUM_NEW} | held out | held-out words, alone and among old ones |
| `train` | {NUM_KEPT} | as the base was trained on | old words: so that nothing is forgotten |
| `new` | {NUM_TESTS} | held out | the same, other recordings: to test |
| `old` | {NUM_TESTS} | as the base was trained on | old words: to test that |

OGG to train on and FLAC to test with, at 16 kHz; each folder has a `metadata.csv` with the columns `file_name` and
`transcription`. Made by `scripts/build_builtin/whisper/make_dataset.py`.
"""
_LICENSE = """The recordings were synthesised by espeak-ng 1.51 (https://github.com/espeak-ng/espeak-ng) from word lists
that were written for this project. The program is under the GPL, version 3; what it says is not a work derived from it.
Recordings and transcripts are licensed under Apache-2.0, as the project is; see LICENSE at the top of the project.
"""


def utterances(name: str) -> list[Utterance]:
    """Those of "train", "new" or "old"; no two are equal."""
    rng = random.Random(f"spoken-digits {name}")
    if name == "old":
        return [_quiet(draw(rng, _SEEN, ACCENTS, MOST_WORDS)) for _ in range(NUM_TESTS)]
    count = NUM_NEW if name == "train" else NUM_TESTS
    vocabularies: tuple[Sequence[str], ...] = (HELD_OUT_WORDS, (*HELD_OUT_WORDS, *_SEEN))
    drawn = [_quiet(draw(rng, vocabularies[index % 2], [HELD_OUT_ACCENT], MOST_WORDS)) for index in range(count)]
    missing = set(HELD_OUT_WORDS) - {word for one in drawn for word in one.words}
    if missing:
        raise ValueError(f"{name} lacks {missing}; draw more.")
    kept = NUM_KEPT if name == "train" else 0
    return [*drawn, *(_quiet(draw(rng, _SEEN, ACCENTS, MOST_WORDS)) for _ in range(kept))]


def _quiet(one: Utterance) -> Utterance:
    """Without noise, which FLAC cannot make small."""
    return Utterance(one.words, one.voice, one.pitch, one.speed, 0.0, one.lead_s)


def write(folder: Path, spoken: Sequence[Utterance], ending: str = "flac") -> None:
    """Write recordings and metadata.csv; OGG files hold a number that is new each time, and the same sound."""
    folder.mkdir(parents=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(("file_name", "transcription"))
        for index, one in enumerate(spoken):
            name = f"{index:03}.{ending}"
            soundfile.write(folder / name, speak(one), SAMPLING_RATE)
            table.writerow((name, one.text))


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    output = parser.parse_args().output
    torch.set_num_threads(1)

    def fill(folder: Path) -> None:
        for name, ending in (("train", "ogg"), ("new", "flac"), ("old", "flac")):
            write(folder / name, utterances(name), ending)
        (folder / "README.md").write_text(_README, encoding="utf-8")
        (folder / "LICENSE").write_text(_LICENSE, encoding="utf-8")

    replace_folder(output, fill)
    print(output)


if __name__ == "__main__":
    main()
