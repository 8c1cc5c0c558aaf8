"""How far a prediction is from its target: a row of LOSSES for each measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from torch import Tensor


class LossFunction(Protocol):
    """A distance between a prediction and its target."""

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each sample, [batch] float32; both are [batch, channels, height, width]."""


class MeanSquaredError:
    """The squared error, averaged over a sample's latents (Ho et al. 2020, arXiv 2006.11239, equation 14)."""

    name: ClassVar[str] = "mse"

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Returns [batch] float32; both are [batch, channels, height, width]."""
        return (predicted.float() - target).square().mean(dim=(1, 2, 3))


LOSSES: Mapping[str, Callable[..., LossFunction]] = {loss.name: loss for loss in (MeanSquaredError,)}
