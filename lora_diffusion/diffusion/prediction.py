"""What a network predicts: a row of PREDICTIONS for each target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.diffusion.schedule import NoiseSchedule


class Prediction(Protocol):
    """A training target and what it does to loss weights."""

    name: str

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns what the network should give, [batch, channels, height, width].

        Args:
            schedule: of the noise.
            latents: x0, [batch, channels, height, width].
            noise: eps, of the same shape.
            timesteps: [batch].
        """

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns the factor by which this target's loss already exceeds the loss of x0, [batch]; `snr` is [batch]."""


class Epsilon:
    """The network predicts the noise (Ho et al. 2020, arXiv 2006.11239, equation 14)."""

    name = "epsilon"

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise itself, [batch, channels, height, width] as all but `timesteps` [batch] are."""
        del schedule, latents, timesteps
        return noise

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns the SNR, [batch] (Hang et al. 2023, arXiv 2303.09556, section 3.3)."""
        return snr


class Velocity:
    """The network predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.

    Source: Salimans and Ho 2022, arXiv 2202.00512, appendix D.
    """

    name = "v_prediction"

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the velocity, [batch, channels, height, width] as all but `timesteps` [batch] are."""
        signal, sigma = schedule.signal_and_noise(timesteps)
        return signal * noise - sigma * latents

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns SNR + 1, [batch] (Hang et al. 2023, arXiv 2303.09556, section 3.3)."""
        return snr + 1


PREDICTIONS: Mapping[str, Prediction] = {prediction.name: prediction for prediction in (Epsilon(), Velocity())}


def find_prediction(name: str) -> Prediction:
    """Returns the object for a scheduler's `prediction_type`.

    Raises:
        ModelError: a type that is not trained here.
    """
    if name not in PREDICTIONS:
        raise ModelError(f"The base predicts {name!r}, which cannot be trained; known: {', '.join(PREDICTIONS)}.")
    return PREDICTIONS[name]
