"""Loss weights over timesteps."""

from __future__ import annotations

from torch import Tensor

from lora_diffusion.diffusion.prediction import Prediction


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Returns min(SNR, gamma) / divisor, the divisor being SNR for noise and SNR + 1 for velocity, [batch].

    Args:
        snr: [batch] float32.
        gamma: 5 in the paper.
        prediction: what the network predicts.

    Source: Hang et al. 2023, arXiv 2303.09556, section 3.4. Where the SNR is 0 (zero terminal SNR) the weight of a
    noise prediction is its limit, 1.
    """
    divisor = prediction.snr_divisor(snr)
    weight = snr.clamp(max=gamma) / divisor
    return weight.where(divisor > 0, weight.new_ones(()))
