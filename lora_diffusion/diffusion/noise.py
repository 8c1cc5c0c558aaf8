"""The noise of a training step: a row of NOISES for each sort of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """A way to draw the noise that is added to latents."""

    def draw(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws noise for latents of this shape on the CPU, [batch, channels, height, width] float32."""


class Gaussian:
    """Standard normal noise."""

    name: ClassVar[str] = "gaussian"

    def draw(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws one normal number for each latent, [batch, channels, height, width]."""
        return torch.randn(shape, generator=rng)


@dataclass(frozen=True)
class Offset:
    """Standard normal noise, plus `strength` times one normal number for each channel.

    It lets a model learn images that are dark or bright as a whole (Guttenberg 2023, "Diffusion with offset noise").
    """

    strength: float
    name: ClassVar[str] = "offset"

    def draw(self, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Draws the noise and then the offsets, [batch, channels, height, width]."""
        noise = torch.randn(shape, generator=rng)
        noise += self.strength * torch.randn(*shape[:2], 1, 1, generator=rng)
        return noise


NOISES: Mapping[str, Callable[..., Noise]] = {noise.name: noise for noise in (Gaussian, Offset)}
