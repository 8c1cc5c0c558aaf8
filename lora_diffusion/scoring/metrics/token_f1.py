"""How many words an answer shares with its target."""

from __future__ import annotations

import re
import string
from collections import Counter

import torch

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.scoring.metrics._shared import TextDefaults

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TokenF1(TextDefaults):
    """F1 of the words of answer and target, without case, punctuation and articles.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250, section 5, and the script that the SQuAD pages publish.
    """

    name = "token_f1"
    meaning = "words that answer and target share (F1, 0 to 1)"

    def score(self, evidence: Evidence) -> Scores:
        """Returns 0 to 1 for each answer."""
        pairs = zip(evidence.answers, evidence.targets, strict=True)
        return Scores(torch.tensor([_f1(_words(answer), _words(target)) for answer, target in pairs]))


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: list[str], target: list[str]) -> float:
    if not answer or not target:
        return float(answer == target)
    return 2 * (Counter(answer) & Counter(target)).total() / (len(answer) + len(target))


METRIC = TokenF1()
