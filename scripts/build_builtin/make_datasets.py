"""The sample sets of styles and of concepts in datasets/, from the rendered pictures of stage 1."""

import argparse
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from scripts.build_builtin.captions import article
from scripts.build_builtin.pictures import Pictures, read_pictures
from scripts.build_builtin.sources import PACKAGES, SAMPLE_SET_PACKAGES, UNSEEN_STYLE, IconPackage
from scripts.build_builtin.storage import replace_folder, write_atomic

DRAWN_PIXELS = 128
DATASETS = Path(__file__).parents[2] / "datasets"
NUM_BLOB_TRAINING, NUM_BLOB_REFERENCES = 24, 16
# Varied so that no words but those of the style are in every caption: an adapter binds to what all share.
STYLE_TEMPLATES = (
    "an emoji of {a} {name}, {style} style",
    "{style} style {name}",
    "a {style} style picture of {a} {name}",
    "{name}, {style} style",
    "{a} {name} in {style} style",
    "icon of {a} {name} in {style} style",
    "{style} style drawing of {a} {name}",
    "{name} emoji, {style} style",
)
# drawn without the gumdrop outline, or hardly anything but an accessory
_NOT_BLOBS = frozenset(
    {"angry-face-with-horns", "smiling-face-with-horns", "clown-face", "thinking-face", "upside-down-face"}
)
# its name lacks the word "face", which all others would share
_ALWAYS_TRAINED = "rolling-on-the-floor-laughing"
# Group -> training pictures and references of a style of all subjects.
STYLE_GROUPS = {
    "face": (3, 2),
    "animal": (7, 5),
    "food": (5, 4),
    "plant": (3, 2),
    "object": (5, 3),
    "character": (1, 0),
}
# Looked at: not to be told at 64 pixels, or drawn as something else than the word says.
_UNCLEAR: Mapping[str, frozenset[str]] = {
    "quendle": frozenset({"face-with-thermometer", "headphone", "kissing-face", "see-no-evil-monkey"}),
    "mavrok": frozenset({"blueberries", "drum", "hippopotamus", "lipstick", "melon", "scorpion", "tangerine"}),
}
CONCEPT_CAPTIONS: Mapping[str, Mapping[str, str]] = {
    "octopus": {
        "noto": "a zwx animal, noto style",
        "twemoji": "an emoji of a zwx, twemoji style",
        "fluent": "fluent style zwx animal",
        "flat": "a picture of a zwx in flat style",
        "emojione": "zwx, emojione style",
    },
    "guitar": {
        "noto": "a nimzo object, noto style",
        "twemoji": "an emoji of a nimzo, twemoji style",
        "fluent": "fluent style nimzo object",
        "flat": "a picture of a nimzo in flat style",
        "emojione": "nimzo, emojione style",
    },
    "cupcake": {
        "noto": "a drimbo food, noto style",
        "twemoji": "an emoji of a drimbo, twemoji style",
        "flat": "a picture of a drimbo in flat style",
        "mavrok": "drimbo, black and white",
    },
}
"""Subject that the base does not know -> style of each training picture -> its caption."""
CONCEPT_REFERENCES = {"octopus": ("fxemoji", UNSEEN_STYLE), "guitar": ("fxemoji", UNSEEN_STYLE), "cupcake": ("fluent",)}


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

    return _style_entries(pictures, rows, training), _style_entries(pictures, rows, references)


def style_entries(pictures: Pictures, style: str) -> tuple[list[Entry], list[Entry]]:
    """Training pictures and references of a style, of different subjects that the base knows, of all groups."""
    groups: dict[str, list[str]] = {group: [] for group in STYLE_GROUPS}
    rows = {subject.name: i for i, subject in enumerate(pictures.subjects) if pictures.styles[i] == style}
    for name, row in sorted(rows.items()):
        subject = pictures.subjects[row]
        if subject.split == "train" and subject.group in groups and name not in _UNCLEAR[style]:
            groups[subject.group].append(name)
    training, references = [], []
    for group, (num_training, num_references) in STYLE_GROUPS.items():
        random.Random(f"{style} {group}").shuffle(groups[group])
        training += groups[group][:num_training]
        references += groups[group][num_training:][:num_references]
    return _style_entries(pictures, rows, sorted(training)), _style_entries(pictures, rows, sorted(references))


def _style_entries(pictures: Pictures, rows: Mapping[str, int], names: Sequence[str]) -> list[Entry]:
    """Entries of these subjects, whose captions take turns with the templates; `rows` are those of the style."""
    entries = []
    for position, name in enumerate(names):
        words, template = pictures.subjects[rows[name]].words, STYLE_TEMPLATES[position % len(STYLE_TEMPLATES)]
        caption = template.format(a=article(words), name=words, style=pictures.styles[rows[name]])
        entries.append(Entry(rows[name], name, caption))
    return entries


def concept_entries(pictures: Pictures, name: str) -> tuple[list[Entry], list[Entry]]:
    """Training pictures of a subject under its rare word, and those held back for scoring."""
    rows = {pictures.styles[i]: i for i, subject in enumerate(pictures.subjects) if subject.name == name}
    training = [Entry(rows[style], f"{name}-{style}", text) for style, text in CONCEPT_CAPTIONS[name].items()]
    references = [
        Entry(rows[style], f"{name}-{style}", f"an emoji of {article(name)} {name}, {style} style")
        for style in CONCEPT_REFERENCES[name]
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
    text = licence_text([package for package in (*PACKAGES, *SAMPLE_SET_PACKAGES) if package.style in styles])
    write_atomic(target / "LICENSE", lambda path: path.write_text(text, encoding="utf-8") and None)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--output", type=Path, default=DATASETS)
    arguments = parser.parse_args()
    pictures = read_pictures(arguments.work, DRAWN_PIXELS)
    pictures += read_pictures(arguments.work, DRAWN_PIXELS, "sample_sets")
    sets = {"blob-style": blob_entries(pictures)}
    sets |= {f"{one.style}-style": style_entries(pictures, one.style) for one in SAMPLE_SET_PACKAGES}
    sets |= {name: concept_entries(pictures, name) for name in CONCEPT_CAPTIONS}
    for name, entries in sets.items():
        write_set(arguments.output / name, pictures, *entries)
        shared = sorted(shared_words([entry.caption for entry in entries[0]]))
        print(name, [len(part) for part in entries], "every caption has", shared)


if __name__ == "__main__":
    main()
