"""How much each timestep counts in the loss: a row of WEIGHTINGS for each rule. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.diffusion.prediction import Prediction


class Weighting(Protocol):
    """A rule for loss weights over timesteps."""

    def weights(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Returns the weight of each sample's loss, [batch] float32.

        Args:
            snr: signal-to-noise ratio at the sample's timestep, [batch] float32.
            prediction: what the network predicts.
        """


class Uniform:
    """All timesteps count alike."""

    name: ClassVar[str] = "uniform"

    def weights(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Returns 1 for each sample, [batch]; `snr` is [batch]."""
        del prediction
        return snr.new_ones(snr.shape)


@dataclass(frozen=True)
class MinSnr:
    """Weight min(SNR, gamma) / divisor, the divisor being SNR for noise and SNR + 1 for velocity.

    Gamma is 5 in the paper. Where the SNR is 0 (zero terminal SNR) the weight of a noise prediction is
    its limit, 1.

    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4.
    """

    gamma: float = 5.0
    name: ClassVar[str] = "min_snr"

    def weights(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Returns the weight of each sample, [batch]; `snr` is [batch]."""
        divisor = prediction.snr_divisor(snr)
        weight = snr.clamp(max=self.gamma) / divisor
        return weight.where(divisor > 0, weight.new_ones(()))


WEIGHTINGS: Mapping[str, Callable[..., Weighting]] = {rule.name: rule for rule in (Uniform, MinSnr)}
