"""Captions with the trigger that must keep what the base makes of the rest of them.

A style is learnt from few subjects, and its trigger soon carries these: half of all others then turn into one of them.
A subject is learnt from images of few looks, and its trigger carries those. So captions name other things, or other
looks, beside the trigger, and what the base predicts for the same without the trigger is kept: of a style at high
noise, where the layout of an image is settled, of a subject at low noise, where its look is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lora_diffusion.core.base_model import TextLimit
from lora_diffusion.core.samples import AnchorPairs
from lora_diffusion.data.captions import THINGS, num_others

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


@dataclass(frozen=True)
class Anchors:
    """Makes the anchors of a data set, of one image at a time."""

    trigger: str
    """As it is published."""
    num_captions: int
    """Of the data set; a caption of few gets more of them."""
    text_limit: TextLimit | None = None
    """Of the base; None takes all words for known."""

    def of_image(self, what: str, caption: str, priors: Sequence[str], seed: str) -> AnchorPairs:
        """Returns captions that name other things or looks beside the trigger, each with what the base reads instead.

        Args:
            what: content or look.
            caption: of the image; it names the look of the image.
            priors: what `captions.priors` makes of it.
            seed: chooses words and templates.
        """
        rng = random.Random(seed)  # noqa: S311
        if what == "content":
            chosen = self._chosen(self._known_things, rng)
            return tuple(_filled(rng.choice(_WITH_THING), trigger=self.trigger, thing=thing) for thing in chosen)
        looks = self._chosen(_LOOKS, rng)
        listed = (
            _filled(rng.choice(_WITH_LOOK), trigger=self.trigger, look=look, thing=rng.choice(THINGS)) for look in looks
        )
        return (*((caption, prior) for prior in priors), *listed)

    @cached_property
    def _known_things(self) -> Sequence[str]:
        """What a text encoder spells in pieces it hardly knows."""
        if self.text_limit is None:
            return THINGS
        lengths = self.text_limit.num_tokens(THINGS)
        return tuple(thing for thing, length in zip(THINGS, lengths, strict=True) if length == 1) or THINGS

    def _chosen(self, words: Sequence[str], rng: random.Random) -> list[str]:
        return rng.sample(words, min(num_others(self.num_captions), len(words)))


def _filled(templates: tuple[str, str], **words: str) -> tuple[str, str]:
    caption, of_base = templates
    return caption.format(**words), of_base.format(**words)
