"""How much signal and noise there is at each timestep."""

from __future__ import annotations

from dataclasses import dataclass

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
        """Returns sqrt(alpha_bar) and sqrt(1 - alpha_bar) at timesteps [batch], each [batch, 1, 1, 1] float32."""
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def snr(self, timesteps: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio alpha_bar / (1 - alpha_bar) at timesteps [batch], [batch]."""
        alpha_bar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps.

        Args:
            latents: x0, [batch, channels, height, width].
            noise: eps, of the same shape.
            timesteps: [batch].

        Returns:
            [batch, channels, height, width]
        """
        signal, sigma = self.signal_and_noise(timesteps)
        return signal * latents + sigma * noise


def rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Returns the schedule stretched so that its last timestep holds no signal and its first stays as it is.

    Args:
        alphas_cumprod: [num_timesteps] float32, falling; the result has the same shape.

    Source: Lin et al. 2023, arXiv 2305.08891, algorithm 1.

    >>> import torch
    >>> rescale_to_zero_snr(torch.tensor([0.81, 0.25, 0.01]))
    tensor([0.8100, 0.2025, 0.0000])
    """
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * first / (first - last)).square()
