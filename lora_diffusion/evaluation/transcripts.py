"""How well recordings were understood: error rates of words and letters, and the recordings that went worst."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.evidence import Evidence
from lora_diffusion.core.files import read_json

_ENGLISH = "en"
_SPELLING = "normalizer.json"
"""File of a base: British spelling -> American, for the normaliser."""


@dataclass(frozen=True)
class Heard:
    """One recording: what was said, what was heard, both as they are compared."""

    key: str
    said: str
    heard: str
    wer: float
    """Words to change, add and leave out, for each word said."""
    cer: float
    """The same of letters."""


@dataclass(frozen=True)
class Understanding:
    """Error rates of a whole set: edits over length, so that long recordings count for more."""

    wer: float
    cer: float
    recordings: tuple[Heard, ...]
    """Worst first."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"wer": self.wer, "cer": self.cer, "recordings": [vars(one) for one in self.recordings]}

    def lines(self, most: int = 10) -> list[str]:
        """Returns the rates, and the worst recordings, as lines of plain text."""
        wrong = [one for one in self.recordings if one.wer > 0]
        rows = [f"  {one.wer:6.1%}  {one.key}: said {one.said!r}, heard {one.heard!r}" for one in wrong[:most]]
        left = [f"  and {len(wrong) - most} more with errors"] if len(wrong) > most else []
        return [f"WER {self.wer:.1%}, CER {self.cer:.1%} over {len(self.recordings)} recordings", *rows, *left]


def judge(
    keys: Sequence[str], said: Sequence[str], heard: Sequence[str], normalise: Sequence[Callable[[str], str]]
) -> Understanding:
    """Compares transcripts after the right one and that of the model went through the same normaliser.

    Args:
        keys: names of the recordings.
        said: the right transcripts.
        heard: those of the model.
        normalise: for each recording what `normaliser` gives for its language.
    """
    targets, answers = ([own(text) for own, text in zip(normalise, texts, strict=True)] for texts in (said, heard))
    evidence = Evidence(answers=answers, targets=targets)
    scores = {name: registry.find("metrics", name).score(evidence) for name in ("wer", "cer")}
    rates = {name: score.values.tolist() for name, score in scores.items()}
    rows = [Heard(*row) for row in zip(keys, targets, answers, rates["wer"], rates["cer"], strict=True)]
    rows.sort(key=lambda row: (-row.wer, -row.cer, row.key))
    return Understanding(scores["wer"].mean(), scores["cer"].mean(), tuple(rows))


def normaliser(language: str, base: Path | None) -> Callable[[str], str]:
    """Returns Whisper's normaliser: no case, no punctuation, and in English one spelling of numbers and words.

    Args:
        language: code of what is written.
        base: folder of the base, which may hold a table of spellings.

    Raises:
        ModelError: that table is damaged.

    Source: Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", appendix C.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if language != _ENGLISH:
        return BasicTextNormalizer()  # type: ignore[no-any-return]
    return EnglishTextNormalizer(_spelling(base / _SPELLING) if base else {})  # type: ignore[no-any-return]


def _spelling(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        table = read_json(path)
        if isinstance(table, dict) and all(isinstance(word, str) for word in table.values()):
            return table
        fault = "it maps no words to words"
    except (OSError, ValueError) as error:
        fault = str(error)
    raise ModelError(f"{path} of the base cannot be read as a table of spellings ({fault}); fetch it again.")
