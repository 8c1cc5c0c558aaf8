"""How well questions about pictures were answered: to the letter, by their words, and the answers that went worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from lora_diffusion.core import registry
from lora_diffusion.core.evidence import Evidence
from lora_diffusion.scoring.scorers import Scorers


@dataclass(frozen=True)
class Answered:
    """One question: what is right, and what was answered."""

    key: str
    question: str
    target: str
    answer: str
    exact_match: float
    token_f1: float
    picture: str = ""
    """What was asked about: a file, or the row of a table; "" where the question shows none."""


@dataclass(frozen=True)
class Examination:
    """The scores of a whole set, all questions counted alike."""

    exact_match: float
    token_f1: float
    by_question: Mapping[str, float]
    """Question -> exact match of its answers."""
    answers: tuple[Answered, ...]
    """Worst first."""
    clip_score: float | None = None
    """Mean CLIPScore of the answers as captions, 0 to 2.5: how well a CLIP finds that they fit their pictures."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "exact_match": self.exact_match,
            "token_f1": self.token_f1,
            "clip_score": self.clip_score,
            "by_question": dict(self.by_question),
            "answers": [vars(one) for one in self.answers],
        }

    def lines(self, most: int = 10) -> list[str]:
        """Returns the scores, and the worst answers, as lines of plain text."""
        wrong = [one for one in self.answers if one.exact_match < 1]
        rows = [f"  {one.key}: {one.question} {one.answer!r}, right is {one.target!r}" for one in wrong[:most]]
        left = [f"  and {len(wrong) - most} more that are wrong"] if len(wrong) > most else []
        clip = "" if self.clip_score is None else f", CLIPScore {self.clip_score:.3f}"
        count = len(self.answers)
        return [
            f"exact match {self.exact_match:.1%}, token F1 {self.token_f1:.3f}{clip} over {count} questions",
            *(f"  {share:6.1%}  {question}" for question, share in self.by_question.items()),
            *rows,
            *left,
        ]


def judge(
    keys: Sequence[str],
    questions: Sequence[str],
    targets: Sequence[str],
    answers: Sequence[str],
    pictures: Sequence[Image] = (),
    scorers: Scorers | None = None,
    names: Sequence[str] = (),
) -> Examination:
    """Compares answers with what is right.

    Args:
        keys: names of the conversations.
        questions: what was asked.
        targets: the right answers.
        answers: those of the model.
        pictures: what was asked about, for a CLIPScore.
        scorers: the CLIP of it; none leaves it out.
        names: files of the pictures.
    """
    evidence = Evidence(answers=answers, targets=targets, pictures=pictures, meanings=answers, scorers=scorers)
    scores = {name: registry.find("metrics", name).score(evidence) for name in ("exact_match", "token_f1")}
    columns = [scores[name].values.tolist() for name in ("exact_match", "token_f1")]
    named = names or [""] * len(keys)
    rows = [Answered(*row) for row in zip(keys, questions, targets, answers, *columns, named, strict=True)]
    shares: dict[str, list[float]] = {}
    for row in rows:
        shares.setdefault(row.question, []).append(row.exact_match)
    return Examination(
        exact_match=scores["exact_match"].mean(),
        token_f1=scores["token_f1"].mean(),
        by_question={question: sum(own) / len(own) for question, own in sorted(shares.items())},
        answers=tuple(sorted(rows, key=lambda row: (row.exact_match, row.token_f1, row.key))),
        clip_score=registry.find("metrics", "clip_score").score(evidence).mean() if scorers else None,
    )
