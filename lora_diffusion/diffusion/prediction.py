"""What a network predicts: one object for each kind, held by a family."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.diffusion.noise import NoiseSchedule


class Prediction(Protocol):
    """A training target and what it does to loss weights."""

    name: str

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns what the network should give, shaped like the latents."""

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns the factor by which this target's loss already exceeds the loss of x0, [batch]."""


class Epsilon:
    """The network predicts the noise (Ho et al. 2020, arXiv 2006.11239, equation 14)."""

    name = "epsilon"

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise itself."""
        del schedule, latents, timesteps
        return noise

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns the SNR (Hang et al. 2023, arXiv 2303.09556, section 3.3)."""
        return snr


class Velocity:
    """The network predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0.

    Source: Salimans and Ho 2022, arXiv 2202.00512, appendix D.
    """

    name = "v_prediction"

    def target(self, schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the velocity."""
        signal, sigma = schedule.signal_and_noise(timesteps)
        return signal * noise - sigma * latents

    def snr_divisor(self, snr: Tensor) -> Tensor:
        """Returns SNR + 1 (Hang et al. 2023, arXiv 2303.09556, section 3.3)."""
        return snr + 1


_PREDICTIONS: dict[str, Prediction] = {kind.name: kind for kind in (Epsilon(), Velocity())}


def find_prediction(name: str) -> Prediction:
    """Returns the object for a scheduler's `prediction_type`.

    Raises:
        ModelError: a type that is not trained here.
    """
    if name not in _PREDICTIONS:
        raise ModelError(f"The base predicts {name!r}, which cannot be trained; known: {', '.join(_PREDICTIONS)}.")
    return _PREDICTIONS[name]
