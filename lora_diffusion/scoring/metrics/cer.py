"""Character error rate."""

from __future__ import annotations

from lora_diffusion.scoring.metrics._shared import ErrorRate


class CharacterErrorRate(ErrorRate):
    """Characters to change, add and leave out, for each character of the target."""

    name = "cer"
    meaning = "character error rate"
    counter = "process_characters"


METRIC = CharacterErrorRate()
