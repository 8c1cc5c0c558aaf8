"""How sure a mean is: intervals by resampling prompts and seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_NUM_SAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the range in which it lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        """Whether a difference of 0 cannot be excluded; nothing can where there is no value."""
        return not (self.low > 0 or self.high < 0)

    @property
    def has_bounds(self) -> bool:
        """Whether there were values enough to say how sure the mean is."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def num_needed(self, num: int) -> float:
        """Returns how many scores it would take for an interval around the same mean that leaves out 0.

        Intervals narrow with the square root of the number of scores.

        Args:
            num: scores that this interval was made from.
        """
        half = (self.high - self.low) / 2
        return num * (half / self.mean) ** 2 if self.mean else float("inf")


@dataclass(frozen=True)
class MeanWithError:
    """A mean and how sure it is, for values that are taken to be independent."""

    mean: float
    half_width: float
    """1.96 standard errors over the values; NaN where there is only one."""

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def mean_with_error(values: Tensor) -> MeanWithError:
    """Returns the mean of values [num] and 1.96 of its standard errors."""
    half = 1.96 * values.std().item() / len(values) ** 0.5 if len(values) > 1 else math.nan
    return MeanWithError(values.mean().item(), half)


def interval(values: NDArray[np.float64]) -> Interval:
    """Returns the bootstrap percentile interval of a mean over prompts that were all generated with the same seeds.

    A seed is the same noise for all prompts, so prompts and seeds are drawn with replacement apart from each other, and
    a value counts as often as its prompt times as often as its seed (Owen 2007, "The pigeonhole bootstrap", arXiv
    0712.1111). The draws depend on the shape only, so that equal values always give equal intervals.

    Args:
        values: [prompts, seeds]; give differences for a paired comparison.

    Returns:
        Infinite bounds where there is only one value.
    """
    prompts, seeds = _crossed(*values.shape)
    return _percentiles(values, ((prompts @ values) * seeds).sum(axis=1))


def nested_interval(values: NDArray[np.float64]) -> Interval:
    """Returns the interval of a mean over prompts that each have seeds of their own.

    Prompts are drawn with replacement, then for each of them its seeds (a bootstrap in two stages, Davison and Hinkley
    1997, section 3.8).

    Args:
        values: [prompts, seeds], as of `interval`.
    """
    return _percentiles(values, _nested(*values.shape) @ values.ravel())


def _percentiles(values: NDArray[np.float64], means: NDArray[np.float64]) -> Interval:
    if values.size == 1:
        return Interval(float(values.mean()), -math.inf, math.inf)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


@cache
def _crossed(num_prompts: int, num_seeds: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns shares of prompts [samples, prompts] and of seeds [samples, seeds] in each resample; rows sum to 1."""
    rng = np.random.default_rng(0)
    prompts, seeds = (rng.multinomial(num, [1 / num] * num, _NUM_SAMPLES) / num for num in (num_prompts, num_seeds))
    return prompts, seeds


@cache
def _nested(num_prompts: int, num_seeds: int) -> NDArray[np.float64]:
    """Returns what each value counts in each resampled mean, [samples, prompts * seeds]; rows sum to 1."""
    rng = np.random.default_rng(0)
    num_values = num_prompts * num_seeds
    weights = np.empty((_NUM_SAMPLES, num_values))
    for row in weights:
        prompts = rng.integers(num_prompts, size=(num_prompts, 1))
        seeds = rng.integers(num_seeds, size=(num_prompts, num_seeds))
        row[:] = np.bincount((prompts * num_seeds + seeds).ravel(), minlength=num_values) / num_values
    return weights
