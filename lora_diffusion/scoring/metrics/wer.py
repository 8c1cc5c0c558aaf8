"""Word error rate."""

from __future__ import annotations

from lora_diffusion.scoring.metrics._shared import ErrorRate


class WordErrorRate(ErrorRate):
    """Words to change, add and leave out, for each word of the target."""

    name = "wer"
    meaning = "word error rate"
    counter = "process_words"


METRIC = WordErrorRate()
