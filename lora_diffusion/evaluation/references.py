"""What is written beside the reference images: their captions, in words that a scorer knows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.data import captions
from lora_diffusion.data.folder import list_folder
from lora_diffusion.data.images import ENDINGS
from lora_diffusion.evaluation.suites import control_prompts

MAX_COUNTERPARTS = 48
"""References of which the base generates its own."""


def counterparts(captions: Sequence[str], num: int, controls: Sequence[str], first_seed: int) -> list[tuple[str, int]]:
    """Returns prompt and seed of what the base is to generate beside the first references, of the same subjects.

    Args:
        captions: as `read_captions` gives them.
        num: references.
        controls: prompts without trigger words, which take turns where a reference has no caption; at least one.
        first_seed: of the first image of a prompt; the next one of the same prompt has the next seed.
    """
    turns = cycle(controls)
    texts = [text or next(turns) for text in (captions or [""] * num)][:MAX_COUNTERPARTS]
    return [(text, first_seed + texts[:index].count(text)) for index, text in enumerate(texts)]


def read_captions(path: str, references: Sequence[Path], triggers: Sequence[str], setting: str) -> tuple[str, ...]:
    """Returns the caption of each reference without trigger words, the first where it has several.

    Captions lie beside the images as in a folder that is trained on. What is wrong with them is one warning.

    Args:
        path: the folder, as the user gave it.
        references: images in it.
        triggers: words that the scorer does not know.
        setting: where the user gave the folder, for messages.

    Returns:
        "" for each reference without a caption; nothing at all where none has one.
    """
    errors: list[str] = []
    by_image = captions.collect(list_folder(path, "images", ENDINGS, setting), errors)
    if errors:
        logger.warning("%s=%s: captions that are left out: %s", setting, path, name_some(errors))
    texts = [next(iter(by_image.get(image) or ()), "") for image in references]
    for trigger in filter(None, triggers):
        texts = control_prompts(texts, trigger)
    return tuple(texts) if any(texts) else ()
