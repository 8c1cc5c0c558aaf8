"""Captions with the trigger that must keep what the base makes of the rest of them.

A style is learnt from few subjects, and its trigger soon carries these: half of all others then turn into one of them.
A subject is learnt from images of few looks, and its trigger carries those. So captions name other things, or other
looks, beside the trigger, and what the base predicts for the same without the trigger is kept: of a style at high
noise, where the layout of an image is settled, of a subject at low noise, where its look is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from lora_diffusion.data.captions import THINGS, priors

Pairs = tuple[tuple[str, str], ...]
"""What the adapter reads, and what the base reads in its place."""
_FEWEST, _IN_ALL = 4, 64
"""Of each caption, and of all together where there are few."""
_LOOKS = (
    "watercolor painting", "oil painting", "pencil sketch", "ink drawing", "pixel art", "vector art", "line art",
    "3d render", "clay model", "paper cutout", "embroidery", "stained glass", "mosaic", "comic", "cartoon", "photo",
    "black and white photo", "poster", "engraving", "woodcut", "graffiti", "charcoal drawing", "origami", "neon sign",
)  # fmt: skip
"""How images look, as any text encoder knows it."""
_WITH_THING = (
    ("{trigger} {thing}", "{thing}"),
    ("{thing}, {trigger}", "{thing}"),
    ("a {thing} in {trigger}", "a {thing}"),
    ("a picture of a {thing}, {trigger}", "a picture of a {thing}"),
    ("a {trigger} picture of a {thing}", "a picture of a {thing}"),
)
_WITH_LOOK = (
    ("{trigger}, {look}", "{thing}, {look}"),
    ("a {look} of {trigger}", "a {look} of a {thing}"),
    ("{look}, a picture of {trigger}", "{look}, a picture of a {thing}"),
)


def content_anchors(trigger: str, things: Sequence[str], seed: str, num_captions: int) -> Pairs:
    """Returns captions that name other things beside the trigger, each with the same without the trigger.

    Args:
        trigger: as it is published.
        things: words that the base knows.
        seed: chooses things and templates.
        num_captions: in the whole data set; a caption of few gets more of them.
    """
    rng = random.Random(seed)  # noqa: S311
    chosen = _chosen(things, num_captions, rng)
    return tuple(_filled(rng.choice(_WITH_THING), trigger=trigger, thing=thing) for thing in chosen)


def look_anchors(caption: str, trigger: re.Pattern[str], words: str, seed: str, num_captions: int) -> Pairs:
    """Returns the caption, and captions that ask for a look, each with the same about another thing.

    Args:
        caption: one that may hold the trigger, and names the look of its image.
        trigger: as `captions.phrase_pattern` and `words_pattern` give it.
        words: the trigger as it is published.
        seed: chooses looks, things and templates.
        num_captions: in the whole data set; a caption of few gets more of them.
    """
    rng = random.Random(seed)  # noqa: S311
    of_image = [(caption, other) for other in priors(caption, trigger, seed, num_captions)]
    looks = _chosen(_LOOKS, num_captions, rng)
    listed = [_filled(rng.choice(_WITH_LOOK), trigger=words, look=look, thing=rng.choice(THINGS)) for look in looks]
    return (*of_image, *listed)


def _chosen(words: Sequence[str], num_captions: int, rng: random.Random) -> list[str]:
    return rng.sample(words, min(max(_IN_ALL // num_captions, _FEWEST), len(words)))


def _filled(templates: tuple[str, str], **words: str) -> tuple[str, str]:
    caption, of_base = templates
    return caption.format(**words), of_base.format(**words)
