"""The `model:` keys that all Stable Diffusion families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_diffusion.config.schema import ModelOptions


def _one_of(*choices: str) -> tuple[Any, str]:
    return (lambda v: v in choices), f"must be one of {', '.join(choices)}"


@dataclass(frozen=True)
class StableDiffusionOptions(ModelOptions):
    """A Stable Diffusion base and its training objective."""

    prediction: str = "auto"
    """What the UNet predicts: epsilon or v_prediction; auto takes what the base says."""
    zero_terminal_snr: str = "auto"
    """Whether the last timestep is noise without any signal: always or never; auto takes what the base says."""
    clip_skip: int | None = None
    """Layer of the text encoder that is read, counted from the end as kohya and A1111 do: 1 is the last, 2 the one
    before (clip_skip=1 in diffusers). null takes what the base was trained with: 1, and 2 for SDXL."""
    min_snr_gamma: float | None = None
    """Caps the loss weight of timesteps with little noise (5 in the paper); null weighs all alike."""
    noise_offset: float = 0.0
    """Adds a constant of this size to each channel's noise, for very dark or bright pictures."""
    caption_dropout: float = 0.0
    """Share of draws with the empty caption, which keeps guidance working in long runs."""
    prior_weight: float = 0.0
    """Weight of the loss that keeps the trained look to its trigger words: each picture is also shown under its caption
    without them, or with "house" or another word in their place, and must give what the base gives. 1 weighs both
    alike, 0 turns it off; steps take twice as long."""

    ranges: ClassVar[Mapping[str, Any]] = {
        "prediction": _one_of("auto", "epsilon", "v_prediction"),
        "zero_terminal_snr": _one_of("auto", "always", "never"),
        "clip_skip": (lambda v: v >= 1, "must be 1 or greater"),
        "min_snr_gamma": (lambda v: v > 0, "must be greater than 0"),
        "noise_offset": (lambda v: 0 <= v <= 1, "must be between 0 and 1"),
        "caption_dropout": (lambda v: 0 <= v < 1, "must be at least 0 and less than 1"),
        "prior_weight": (lambda v: v >= 0, "must be 0 or greater"),
    }
