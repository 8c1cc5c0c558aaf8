"""Noise schedules, timestep sampling and the noise itself.

Names in formulas: x0 clean latents, eps noise, alpha_bar the cumulated product of 1 - beta (Ho et al. 2020, arXiv
2006.11239, equation 4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete schedule of variance-preserving noise."""

    alphas_cumprod: Tensor
    """[num_timesteps] float32, falling."""

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps."""
        return int(self.alphas_cumprod.shape[0])

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns sqrt(alpha_bar) and sqrt(1 - alpha_bar), each [batch, 1, 1, 1] float32."""
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio alpha_bar / (1 - alpha_bar), [batch]."""
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, [batch, channels, height, width]."""
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * latents + sigma * noise


def rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Returns the schedule stretched so that its last timestep holds no signal and its first stays as it is.

    Source: Lin et al. 2023, arXiv 2305.08891, algorithm 1.

    >>> rescale_to_zero_snr(torch.tensor([0.81, 0.25, 0.01]))
    tensor([0.8100, 0.2025, 0.0000])
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)).square()


def draw_timesteps(num: int, num_timesteps: int, rng: torch.Generator) -> Tensor:
    """Draws uniform timesteps, stratified over the batch so that each batch covers early and late ones.

    The i-th sample falls into the i-th of `num` equal stretches, in random order: the mean stays the same, the variance
    of the loss falls (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).

    Returns:
        [num] int64 in 0..num_timesteps - 1, on the CPU.
    """
    offsets = (torch.randperm(num, generator=rng) + torch.rand(num, generator=rng)) / num
    return (offsets * num_timesteps).long().clamp(max=num_timesteps - 1)


def draw_noise(shape: torch.Size, offset: float, rng: torch.Generator) -> Tensor:
    """Draws standard normal noise, float32 on the CPU, plus `offset` times one normal number for each channel.

    The offset lets a model learn pictures that are dark or bright as a whole (Guttenberg 2023, "Diffusion with offset
    noise").
    """
    noise = torch.randn(shape, generator=rng)
    if offset:
        noise += offset * torch.randn(*shape[:2], 1, 1, generator=rng)
    return noise
