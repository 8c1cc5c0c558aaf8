"""Which subjects the built-in models may see: subjects.tsv, the committed manifest."""

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
GENERATOR = "generator"
SCORER = "scorer"

# train: every model. concept: the scorer only, so that a concept adapter has something new to
# learn and can still be scored. unseen: no model, to measure generalisation.
_ALLOWED_SPLITS = {GENERATOR: frozenset({"train"}), SCORER: frozenset({"train", "concept"})}


@dataclass(frozen=True)
class Subject:
    """One thing to draw; `name` is hyphenated as in the packages, `words` as captions spell it."""

    name: str
    group: str
    split: str

    @property
    def words(self) -> str:
        """Name as plain words."""
        return self.name.replace("-", " ")


def read_subjects(path: Path = HERE / "subjects.tsv") -> list[Subject]:
    """All subjects in file order."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [Subject(row["name"], row["group"], row["split"]) for row in csv.DictReader(stream, delimiter="\t")]


def read_fxemoji_names(path: Path = HERE / "fxemoji_names.tsv") -> dict[str, str]:
    """Subject name -> icon name of FxEmoji, where it is not the name without hyphens."""
    with path.open(newline="", encoding="utf-8") as stream:
        return {row["subject"]: row["fxemoji"] for row in csv.DictReader(stream, delimiter="\t")}


def icon_name(subject: str, style: str, fxemoji: dict[str, str]) -> str:
    """Name under which the package of `style` files the subject."""
    if style != "fxemoji":
        return subject
    return fxemoji.get(subject, subject.replace("-", ""))


def visible(subjects: Iterable[Subject], model: str) -> list[Subject]:
    """Subjects that `model` (GENERATOR or SCORER) may be trained on."""
    allowed = _ALLOWED_SPLITS[model]
    return [subject for subject in subjects if subject.split in allowed]
