"""Stage 3: datasets/emoji-questions, questions about a drawing style that the model has never seen."""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.build_builtin.llava.questions import QUESTIONS, Turn, answers, colours, turns
from scripts.build_builtin.make_datasets import licence_text
from scripts.build_builtin.pictures import Pictures, read_pictures
from scripts.build_builtin.sources import PACKAGES, TRAINING_STYLES, UNSEEN_STYLE
from scripts.build_builtin.storage import replace_folder
from scripts.build_builtin.subjects import SCORER, read_subjects, visible

DEFAULT_OUTPUT = Path(__file__).parents[3] / "datasets" / "emoji-questions"
PIXELS = 64
NUM_NEW_TRAINING, NUM_KNOWN_TRAINING = 96, 240
NUM_NEW_TESTS, NUM_KNOWN_TESTS = 40, 60
_README = f"""# emoji-questions

Questions about small drawings, for trying what an adapter teaches a LLaVA: `builtin:emoji-llava` has never seen the
style `{UNSEEN_STYLE}` (Noto Emoji before 2017), nor said its name.

| folder | pictures | conversations |
|---|---|---|
| `train` | {NUM_NEW_TRAINING} of the new style, {NUM_KNOWN_TRAINING} of known ones | one of each, with four questions |
| `new` | {NUM_NEW_TESTS} of the new style, other subjects | four of each, with one question: to test |
| `known` | {NUM_KNOWN_TESTS} others of the known styles | the same: to test that nothing is forgotten |

`chats.json` in each folder is in LLaVA's layout. Pictures are {PIXELS}x{PIXELS}; colours were counted from their
pixels. Made by `scripts/build_builtin/llava/make_dataset.py`.
"""


@dataclass(frozen=True)
class Item:
    """A picture and the right answers about it."""

    row: int
    file_name: str
    right: dict[str, str]


def items(pictures: Pictures, rows: Sequence[int]) -> list[Item]:
    """The pictures of some rows."""
    chosen = pictures.select(rows)
    named = zip(rows, chosen.subjects, chosen.styles, colours(chosen.pixels), strict=True)
    return [Item(r, f"{s.name}-{style}.png", answers(s, style, colour)) for r, s, style, colour in named]


def split(pictures: Pictures) -> dict[str, list[Item]]:
    """The three folders; no subject of the new style is in two of them."""
    rng = random.Random(11)
    known_names = {subject.name for subject in visible(read_subjects(), SCORER)}
    rows = range(len(pictures))
    new = [r for r in rows if pictures.styles[r] == UNSEEN_STYLE and pictures.subjects[r].name in known_names]
    known = [r for r in rows if pictures.styles[r] in TRAINING_STYLES and pictures.subjects[r].name in known_names]
    rng.shuffle(new)
    rng.shuffle(known)
    return {
        "train": items(pictures, sorted([*new[:NUM_NEW_TRAINING], *known[:NUM_KNOWN_TRAINING]])),
        "new": items(pictures, sorted(new[NUM_NEW_TRAINING:][:NUM_NEW_TESTS])),
        "known": items(pictures, sorted(known[NUM_KNOWN_TRAINING:][:NUM_KNOWN_TESTS])),
    }


def conversation(item: Item, turns: Sequence[Turn], name: str) -> dict[str, Any]:
    """An entry of LLaVA's layout."""
    said = []
    for index, turn in enumerate(turns):
        said.append({"from": "human", "value": ("" if index else "<image>\n") + turn.question})
        said.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": item.file_name, "conversations": said}


def write(folder: Path, pictures: Pictures, chosen: Sequence[Item], *, apart: bool) -> None:
    """Write pictures and chats.json, with all questions of a picture in one conversation or each in its own."""
    folder.mkdir(parents=True)
    entries = []
    for item in chosen:
        pixels = pictures.pixels[item.row].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / item.file_name, optimize=True)
        stem = Path(item.file_name).stem
        if apart:
            single = [Turn(topic, ways[0], item.right[topic]) for topic, ways in QUESTIONS.items()]
            entries += [conversation(item, [turn], f"{stem} {turn.kind}") for turn in single]
        else:
            entries.append(conversation(item, turns(item.right, random.Random(item.file_name)), stem))
    text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
    (folder / "chats.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/llava"))
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    pictures = read_pictures(arguments.work.parent, PIXELS)

    def fill(folder: Path) -> None:
        for name, chosen in split(pictures).items():
            write(folder / name, pictures, chosen, apart=name != "train")
        (folder / "README.md").write_text(_README, encoding="utf-8")
        (folder / "LICENSE").write_text(licence_text(PACKAGES, PIXELS), encoding="utf-8")

    replace_folder(arguments.output, fill)


if __name__ == "__main__":
    main()
