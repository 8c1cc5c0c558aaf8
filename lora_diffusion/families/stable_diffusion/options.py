"""The `model:` keys that all Stable Diffusion families share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lora_diffusion.config.schema import Contradiction, ModelOptions
from lora_diffusion.config.settings import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    PART,
    POSITIVE,
    SHARE,
    Choice,
    fixed,
    from_to,
    one_of,
)

_ANCHOR_FROM: Mapping[str, float] = {"content": 0.8, "look": 0.3}
_ANCHOR_SHARE = 0.04
_NEEDS = {
    "prior_share": "prior_weight",
    "anchor": "anchor_weight",
    "anchor_from": "anchor_weight",
    "anchor_share": "anchor_weight",
}
"""Setting -> the weight without which it does nothing."""


class Anchored(NamedTuple):
    """What is anchored, and the noise levels, 0 to 1, between which it is."""

    what: str
    low: float
    high: float


@dataclass(frozen=True)
class StableDiffusionOptions(ModelOptions):
    """A Stable Diffusion base and its training objective."""

    prediction: str = fixed("auto", one_of("auto", "epsilon", "v_prediction"))
    """What the UNet predicts: epsilon or v_prediction; auto takes what the base says."""
    zero_terminal_snr: str = fixed("auto", one_of("auto", "always", "never"))
    """Whether the last timestep is noise without any signal: always or never; auto takes what the base says."""
    clip_skip: int | None = fixed(None, AT_LEAST_ONE)
    """Layer of the text encoder that is read, counted from the end as kohya and A1111 do: 1 is the last, 2 the one
    before (clip_skip=1 in diffusers). null takes what the base was trained with: 1, and 2 for SDXL."""
    loss_weighting: str | None = fixed(None, Choice(group="weightings"))
    """How much each timestep counts in the loss; null takes min_snr if model.min_snr_gamma is given, else uniform."""
    min_snr_gamma: float | None = fixed(None, POSITIVE)
    """Caps the loss weight of timesteps with little noise (5 in the paper); null weighs all alike."""
    noise_offset: float = fixed(0.0, from_to(0, 1, "must be between 0 and 1"))
    """Adds a constant of this size to each channel's noise, for very dark or bright images."""
    caption_dropout: float = fixed(0.0, SHARE)
    """Share of draws with the empty caption, which keeps guidance working in long runs."""
    prior_weight: float = fixed(0.0, NOT_NEGATIVE)
    """Weight of the loss that keeps the trained look to its trigger words: each image is also shown under its caption
    without them, or with "house" or another word in their place, and must give what the base gives. 1 weighs both
    alike, 0 turns it off."""
    prior_share: float | None = fixed(None, PART)
    """Share of the images that are shown a second time for model.prior_weight; with fewer each counts the more. null
    shows all again, and steps take twice as long."""
    anchor_weight: float = fixed(0.0, NOT_NEGATIVE)
    """Weight of the loss that leaves to the base what stands beside the trigger words: "TRIGGER house" must give what
    the base gives for "house" at the noise levels of model.anchor_from. 0 turns it off."""
    anchor: str | None = fixed(None, one_of("content", "look"))
    """What the trigger words must leave to the base: content for a style, so that other subjects stay what they are;
    look for a subject, so that it can be shown in other styles. null takes content."""
    anchor_from: float | None = fixed(None, SHARE)
    """Noise level, 0 to 1, that parts layout from look: content is anchored above it, look below. null takes 0.8 for
    content and 0.3 for look."""
    anchor_share: float | None = fixed(None, PART)
    """Share of the images that are shown once more for model.anchor_weight; with fewer each counts the more.
    null takes 0.04."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields one if a setting of one loss weighting is given with another."""
        if self.min_snr_gamma is not None and self.loss_weighting not in (None, "min_snr"):
            text = f"model.min_snr_gamma is not used with model.loss_weighting={self.loss_weighting}"
            yield Contradiction(text, "model.min_snr_gamma", ("model.loss_weighting",))
            yield Contradiction(text, "model.loss_weighting", ("model.min_snr_gamma",))
        for key, weight in _NEEDS.items():
            if getattr(self, key) is not None and not getattr(self, weight):
                text = f"model.{key} is not used without model.{weight}"
                yield Contradiction(text, f"model.{key}", (f"model.{weight}",))

    @property
    def priors_again(self) -> float:
        """Share of the images that are shown a second time without their trigger words."""
        return (self.prior_share or 1.0) if self.prior_weight else 0.0

    @property
    def anchors_again(self) -> float:
        """Share of the images that are shown once more under a caption with something beside the trigger words."""
        return (self.anchor_share or _ANCHOR_SHARE) if self.anchor_weight else 0.0

    @property
    def anchored(self) -> Anchored:
        """What the trigger words leave to the base, and at which noise levels."""
        what = self.anchor or "content"
        bound = _ANCHOR_FROM[what] if self.anchor_from is None else self.anchor_from
        return Anchored(what, bound, 1.0) if what == "content" else Anchored(what, 0.0, bound)

    def rows(self) -> Mapping[str, tuple[str, Mapping[str, float]]]:
        """Returns what a training step uses of the tables in `lora_diffusion.diffusion`.

        By the group of the registry: the name of a row, and its settings.
        """
        gamma = self.min_snr_gamma
        return {
            "timesteps": ("stratified", {}),
            "noises": ("offset", {"strength": self.noise_offset}) if self.noise_offset else ("gaussian", {}),
            "weightings": (self.loss_weighting or "uniform", {}) if gamma is None else ("min_snr", {"gamma": gamma}),
            "losses": ("mse", {}),
        }
