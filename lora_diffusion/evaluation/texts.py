"""How well text-output models did: scores of each text against its target, those of the whole set, the worst first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from PIL.Image import Image

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.files import read_json, write_csv
from lora_diffusion.evaluation.harness import measure
from lora_diffusion.scoring.scorers import Scorers

_ENGLISH = "en"
_SPELLINGS = "normalizer.json"
"""File of a base: British spelling -> American, for the normalizer."""
CLIP_SCORE = "clip_score"


@dataclass(frozen=True)
class ScoredText:
    """One text, its target, and its scores."""

    key: str
    target: str
    text: str
    scores: Mapping[str, float]
    question: str = ""
    """The question; "" for a recording."""
    image: str = ""
    """What the question is about: a file, or the row of a table; "" where it shows none."""


@dataclass(frozen=True)
class TextEvaluation(ABC):
    """The scores of a whole set."""

    scores: Mapping[str, float]
    """Metric -> its value for the set, as `Scores.mean` weighs it."""
    texts: tuple[ScoredText, ...]
    """Worst first."""
    list_key: ClassVar[str]
    """Key of the single texts in JSON."""

    def rates(self) -> dict[str, Any]:
        """Returns the scores of the set as plain values."""
        return dict(self.scores)

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Returns plain values of single texts: lines of a table."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values, those of single texts too."""
        return {**self.rates(), self.list_key: self.rows()}

    @abstractmethod
    def lines(self, most: int = 10) -> list[str]:
        """Returns the scores, and the worst texts, as lines of plain text."""

    def text(self) -> str:
        """Returns lines for people."""
        return "\n".join(self.lines())


class TranscriptEvaluation(TextEvaluation):
    """Error rates: edits over length, so that long recordings count for more."""

    list_key = "recordings"

    def rows(self) -> list[dict[str, Any]]:
        """Returns plain values of single recordings."""
        return [{"key": text.key, "said": text.target, "heard": text.text, **text.scores} for text in self.texts]

    def lines(self, most: int = 10) -> list[str]:
        """Returns the rates, and the worst recordings, as lines of plain text."""
        wrong = [text for text in self.texts if text.scores["wer"] > 0]
        rows = [
            f"  {text.scores['wer']:6.1%}  {text.key}: said {text.target!r}, heard {text.text!r}"
            for text in wrong[:most]
        ]
        left = [f"  and {len(wrong) - most} more with errors"] if len(wrong) > most else []
        wer, cer = self.scores["wer"], self.scores["cer"]
        return [f"WER {wer:.1%}, CER {cer:.1%} over {len(self.texts)} recordings", *rows, *left]


class AnswerEvaluation(TextEvaluation):
    """Answers to questions, which all count alike."""

    list_key = "answers"

    @property
    def by_question(self) -> dict[str, float]:
        """Question -> exact match of its answers."""
        shares: dict[str, list[float]] = {}
        for text in self.texts:
            shares.setdefault(text.question, []).append(text.scores["exact_match"])
        return {question: sum(values) / len(values) for question, values in sorted(shares.items())}

    def rates(self) -> dict[str, Any]:
        """Returns the scores of the set as plain values; clip_score is None where it was not computed.

        That one is the mean CLIPScore of the answers as captions, 0 to 2.5.
        """
        return {**self.scores, CLIP_SCORE: self.scores.get(CLIP_SCORE), "by_question": self.by_question}

    def rows(self) -> list[dict[str, Any]]:
        """Returns plain values of single answers."""
        return [
            {
                "key": text.key,
                "question": text.question,
                "target": text.target,
                "answer": text.text,
                **text.scores,
                "picture": text.image,
            }
            for text in self.texts
        ]

    def lines(self, most: int = 10) -> list[str]:
        """Returns the scores, and the worst answers, as lines of plain text."""
        wrong = [text for text in self.texts if text.scores["exact_match"] < 1]
        rows = [f"  {text.key}: {text.question} {text.text!r}, right is {text.target!r}" for text in wrong[:most]]
        left = [f"  and {len(wrong) - most} more that are wrong"] if len(wrong) > most else []
        clip = f", CLIPScore {self.scores[CLIP_SCORE]:.3f}" if CLIP_SCORE in self.scores else ""
        exact, f1 = self.scores["exact_match"], self.scores["token_f1"]
        return [
            f"exact match {exact:.1%}, token F1 {f1:.3f}{clip} over {len(self.texts)} questions",
            *(f"  {share:6.1%}  {question}" for question, share in self.by_question.items()),
            *rows,
            *left,
        ]


OneEvaluation = TypeVar("OneEvaluation", bound=TextEvaluation)


@dataclass(frozen=True)
class SetScores(Generic[OneEvaluation]):
    """The scores of each data set."""

    paths: tuple[Path, ...]
    scores: tuple[OneEvaluation, ...]
    """In the order of the paths."""

    def to_json(self) -> dict[str, Any]:
        """Returns path -> scores."""
        return {name: scores.to_json() for name, scores in self._named().items()}

    def text(self) -> str:
        """Returns lines for people."""
        return "\n".join(line for name, scores in self._named().items() for line in (f"{name}:", *scores.lines()))

    def write_table(self, path: Path) -> None:
        """Writes a line for each text."""
        write_csv(path, [{"set": name, **row} for name, scores in self._named().items() for row in scores.rows()])

    def _named(self) -> dict[str, OneEvaluation]:
        return dict(zip(map(str, self.paths), self.scores, strict=True))


def evaluate_transcripts(
    keys: Sequence[str], targets: Sequence[str], transcripts: Sequence[str], normalizers: Sequence[Callable[[str], str]]
) -> TranscriptEvaluation:
    """Compares transcripts after the right one and that of the model went through the same normalizer.

    Args:
        keys: names of the recordings.
        targets: the right transcripts.
        transcripts: those of the model.
        normalizers: for each recording what `whisper_normalizer` gives for its language.
    """
    targets = [normalize(text) for normalize, text in zip(normalizers, targets, strict=True)]
    texts = [normalize(text) for normalize, text in zip(normalizers, transcripts, strict=True)]
    metrics = [registry.find("metrics", name) for name in ("wer", "cer")]
    scores = measure(metrics, Evidence(answers=texts, targets=targets))
    rows = [ScoredText(*row) for row in zip(keys, targets, texts, _by_text(scores), strict=True)]
    rows.sort(key=lambda row: (-row.scores["wer"], -row.scores["cer"], row.key))
    return TranscriptEvaluation({name: values.mean() for name, values in scores.items()}, tuple(rows))


def evaluate_answers(
    keys: Sequence[str],
    questions: Sequence[str],
    targets: Sequence[str],
    answers: Sequence[str],
    images: Sequence[Image] = (),
    scorers: Scorers | None = None,
    names: Sequence[str] = (),
) -> AnswerEvaluation:
    """Compares answers with what is right.

    Args:
        keys: names of the conversations.
        questions: of the conversations.
        targets: the right answers.
        answers: those of the model.
        images: what the questions are about, for a CLIPScore.
        scorers: the CLIP of it; none leaves it out.
        names: files of the images.
    """
    names = names or [""] * len(keys)
    evidence = Evidence(answers=answers, targets=targets, images=images, scoring_captions=answers, scorers=scorers)
    scores = measure([registry.find("metrics", name) for name in ("exact_match", "token_f1")], evidence)
    rows = [
        ScoredText(key, target, text, row, question, name)
        for key, target, text, row, question, name in zip(
            keys, targets, answers, _by_text(scores), questions, names, strict=True
        )
    ]
    rows.sort(key=lambda row: (row.scores["exact_match"], row.scores["token_f1"], row.key))
    means = {name: values.mean() for name, values in scores.items()}
    if scorers:
        means |= {
            name: values.mean() for name, values in measure([registry.find("metrics", CLIP_SCORE)], evidence).items()
        }
    return AnswerEvaluation(means, tuple(rows))


def _by_text(scores: Mapping[str, Scores]) -> list[dict[str, float]]:
    """Returns metric -> value for each text."""
    columns = [column.values.tolist() for column in scores.values()]
    return [dict(zip(scores, row, strict=True)) for row in zip(*columns, strict=True)]


def whisper_normalizer(language: str, base: Path | None) -> Callable[[str], str]:
    """Returns Whisper's normalizer: no case, no punctuation, and in English one spelling of numbers and words.

    Args:
        language: code of what is written.
        base: folder of the base, which may hold a table of spellings.

    Raises:
        ModelError: that table is damaged.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.
    """
    from transformers.models.whisper import english_normalizer

    classes: Any = english_normalizer
    if language != _ENGLISH:
        return classes.BasicTextNormalizer()  # type: ignore[no-any-return]
    return classes.EnglishTextNormalizer(_spellings(base / _SPELLINGS) if base else {})  # type: ignore[no-any-return]


def _spellings(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        table = read_json(path)
        if isinstance(table, dict) and all(isinstance(word, str) for word in table.values()):
            return table
        reason = "it maps no words to words"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ModelError(f"{path} of the base cannot be read as a table of spellings ({reason}); fetch it again.")
