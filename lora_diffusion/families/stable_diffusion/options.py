"""The `model:` keys that all Stable Diffusion families share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

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
    prior_share: float = fixed(1.0, PART)
    """Share of the images of a step that are shown a second time for model.prior_weight; with 1 steps take twice as
    long."""
    anchor_weight: float = fixed(0.0, NOT_NEGATIVE)
    """Weight of the loss that keeps what the base makes of the words beside the trigger: at the noise levels of
    model.anchor_from, "TRIGGER house" must give what the base gives for "house". 0 turns it off."""
    anchor: str = fixed("content", one_of("content", "look"))
    """What the trigger must leave to the base: content for a style, so that other subjects stay what they are; look for
    a subject, so that it can be shown in other styles."""
    anchor_from: float = fixed(0.8, SHARE)
    """Noise level, 0 to 1, where layout ends and look begins: content is anchored above it, look below."""
    anchor_share: float = fixed(0.1, PART)
    """Share of the images of a step that are shown once more for model.anchor_weight."""

    def contradictions(self) -> Iterator[Contradiction]:
        """Yields one if a setting of one loss weighting is given with another."""
        if self.min_snr_gamma is not None and self.loss_weighting not in (None, "min_snr"):
            text = f"model.min_snr_gamma is not used with model.loss_weighting={self.loss_weighting}"
            yield Contradiction(text, "model.min_snr_gamma", ("model.loss_weighting",))
            yield Contradiction(text, "model.loss_weighting", ("model.min_snr_gamma",))

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
