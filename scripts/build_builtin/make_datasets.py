"""The sample sets datasets/blob-style and datasets/octopus, from the rendered pictures of stage 1."""

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.build_builtin.captions import article
from scripts.build_builtin.pictures import Pictures, read_pictures
from scripts.build_builtin.sources import PACKAGES, UNSEEN_STYLE, IconPackage
from scripts.build_builtin.storage import replace_folder, write_atomic
from scripts.build_builtin.subjects import Subject

DRAWN_PIXELS = 128
DATASETS = Path(__file__).parents[2] / "datasets"
NUM_BLOB_TRAINING, NUM_BLOB_REFERENCES = 24, 16
# Varied so that no words but "blob style" are in every caption: an adapter binds to what all share.
BLOB_TEMPLATES = (
    "an emoji of {a} {name}, blob style",
    "blob style {name}",
    "a blob style picture of {a} {name}",
    "{name}, blob style",
    "{a} {name} in blob style",
    "icon of {a} {name} in blob style",
    "blob style drawing of {a} {name}",
    "{name} emoji, blob style",
)
# drawn without the gumdrop outline, or hardly anything but an accessory
_NOT_BLOBS = frozenset(
    {"angry-face-with-horns", "smiling-face-with-horns", "clown-face", "thinking-face", "upside-down-face"}
)
# its name lacks the word "face", which all others would share
_ALWAYS_TRAINED = "rolling-on-the-floor-laughing"
OCTOPUS_CAPTIONS = {
    "noto": "a zwx animal, noto style",
    "twemoji": "an emoji of a zwx, twemoji style",
    "fluent": "fluent style zwx animal",
    "flat": "a picture of a zwx in flat style",
    "emojione": "zwx, emojione style",
}
OCTOPUS_REFERENCES = ("fxemoji", UNSEEN_STYLE)


@dataclass(frozen=True)
class Entry:
    """One picture of a sample set and its caption."""

    row: int
    file_name: str
    caption: str


def shared_words(captions: Sequence[str]) -> set[str]:
    """Words that every caption contains."""
    return set.intersection(*(set(re.findall(r"\w+", caption)) for caption in captions))


def blob_entries(pictures: Pictures) -> tuple[list[Entry], list[Entry]]:
    """Training and reference faces of the style no model saw, of different subjects."""
    rows: dict[str, int] = {}
    for index, subject in enumerate(pictures.subjects):
        if pictures.styles[index] == UNSEEN_STYLE and subject.group == "face" and subject.name not in _NOT_BLOBS:
            rows[subject.name] = index
    others = sorted(set(rows) - {_ALWAYS_TRAINED})
    random.Random(3).shuffle(others)
    training = sorted([_ALWAYS_TRAINED, *others[: NUM_BLOB_TRAINING - 1]])
    references = sorted(others[NUM_BLOB_TRAINING - 1 :][:NUM_BLOB_REFERENCES])

    def entry(position: int, name: str) -> Entry:
        subject: Subject = pictures.subjects[rows[name]]
        template = BLOB_TEMPLATES[position % len(BLOB_TEMPLATES)]
        return Entry(rows[name], name, template.format(a=article(subject.words), name=subject.words))

    return [entry(*pair) for pair in enumerate(training)], [entry(*pair) for pair in enumerate(references)]


def octopus_entries(pictures: Pictures) -> tuple[list[Entry], list[Entry]]:
    """Training octopuses under the rare word, and those held back for scoring."""
    rows = {pictures.styles[i]: i for i, subject in enumerate(pictures.subjects) if subject.name == "octopus"}
    training = [Entry(rows[style], f"octopus-{style}", caption) for style, caption in OCTOPUS_CAPTIONS.items()]
    references = [
        Entry(rows[style], f"octopus-{style}", f"an emoji of an octopus, {style} style") for style in OCTOPUS_REFERENCES
    ]
    return training, references


def write_entries(folder: Path, pictures: Pictures, entries: Sequence[Entry]) -> None:
    """PNG and caption of every entry."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        image = Image.fromarray(pictures.pixels[entry.row].permute(1, 2, 0).numpy())
        image.save(folder / f"{entry.file_name}.png", optimize=True)
        (folder / f"{entry.file_name}.txt").write_text(entry.caption + "\n", encoding="utf-8")


def licence_text(packages: Sequence[IconPackage], pixels: int = DRAWN_PIXELS) -> str:
    """Attribution of the pictures; the licence texts themselves are in NOTICE and LICENSE of the project."""
    lines = [
        f"The pictures here were drawn at {pixels} pixels on white from vector icons, otherwise unchanged.",
        "",
    ]
    for package in packages:
        lines += [
            f"{package.style}: {package.author}",
            f"  licence {package.licence}, icons of {package.name} {package.version}",
        ]
    lines += ["", "The captions were written for this project and are licensed under Apache-2.0.", ""]
    lines += ["Licence texts and copyright lines: NOTICE and LICENSE at the top of the project.", ""]
    return "\n".join(lines)


def write_set(target: Path, pictures: Pictures, training: Sequence[Entry], references: Sequence[Entry]) -> None:
    """Replace train/, references/ and LICENSE of one sample set."""
    replace_folder(target / "train", lambda folder: write_entries(folder, pictures, training))
    replace_folder(target / "references", lambda folder: write_entries(folder, pictures, references))
    styles = {pictures.styles[entry.row] for entry in (*training, *references)}
    text = licence_text([package for package in PACKAGES if package.style in styles])
    write_atomic(target / "LICENSE", lambda path: path.write_text(text, encoding="utf-8") and None)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--output", type=Path, default=DATASETS)
    arguments = parser.parse_args()
    pictures = read_pictures(arguments.work, DRAWN_PIXELS)
    for name, entries in (("blob-style", blob_entries(pictures)), ("octopus", octopus_entries(pictures))):
        write_set(arguments.output / name, pictures, *entries)
        shared = sorted(shared_words([entry.caption for entry in entries[0]]))
        print(name, [len(part) for part in entries], "every caption has", shared)


if __name__ == "__main__":
    main()
