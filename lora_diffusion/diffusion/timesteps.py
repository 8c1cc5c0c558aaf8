"""Which timesteps a step trains: a row of TIMESTEPS for each way to draw them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class TimestepSampling(Protocol):
    """A way to draw timesteps."""

    def draw(self, num: int, num_timesteps: int, rng: torch.Generator) -> Tensor:
        """Draws timesteps on the CPU, [num] int64 in 0..num_timesteps - 1."""


class Stratified:
    """Uniform timesteps, stratified over the batch so that each batch covers early and late ones.

    The i-th sample falls into the i-th of `num` equal stretches, in random order: the mean stays the same, the variance
    of the loss falls (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """

    name: ClassVar[str] = "stratified"

    def draw(self, num: int, num_timesteps: int, rng: torch.Generator) -> Tensor:
        """Draws one timestep from each stretch, [num] int64."""
        offsets = (torch.randperm(num, generator=rng) + torch.rand(num, generator=rng)) / num
        return (offsets * num_timesteps).long().clamp(max=num_timesteps - 1)


TIMESTEPS: Mapping[str, Callable[..., TimestepSampling]] = {sampling.name: sampling for sampling in (Stratified,)}
