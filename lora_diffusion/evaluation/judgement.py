"""What a metric says of all candidates, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.core.protocols import Metric
from lora_diffusion.evaluation.results import ALL, Case, OpenComparison, Summary
from lora_diffusion.evaluation.statistics import Interval, interval

_FEW_PROMPTS = 5
"""With fewer, resampling cannot know how much prompts differ."""


@dataclass(frozen=True)
class Judgement:
    """The values of one metric."""

    metric: Metric
    candidates: Sequence[str]
    """The base is the first."""
    cases: Sequence[Case]
    """Those that the metric judges."""
    values: NDArray[np.float64]
    """[candidates, cases, seeds]; one seed if the metric gives one value for each prompt."""
    num_seeds: int
    """Pictures behind each case."""

    def summaries(self) -> list[Summary]:
        """Returns means, intervals and paired differences of each candidate, for each kind of case and for all."""
        kinds = (*dict.fromkeys(case.kind for case in self.cases), ALL)
        return [self._summary(index, kind) for kind in kinds for index in range(len(self.candidates))]

    def difference(self, index: int, other: int, kind: str = ALL) -> Interval:
        """Returns how much more one candidate has than another with the same prompts and noise."""
        rows = self._rows(kind)
        return interval(rows[index] - rows[other])

    def _rows(self, kind: str) -> NDArray[np.float64]:
        return self.values[:, [kind in (case.kind, ALL) for case in self.cases]]

    def _summary(self, index: int, kind: str) -> Summary:
        own = interval(self._rows(kind)[index])
        differences: list[float | None] = []
        low, high = _bounds(own)
        for other in (0, 1):
            if index == other or other >= len(self.candidates):
                differences += [None] * 3
            else:
                found = self.difference(index, other, kind)
                differences += [found.mean, *_bounds(found)]
        count = self._rows(kind)[index].size
        return Summary(self.candidates[index], self.metric.name, kind, own.mean, low, high, count, *differences)

    @cached_property
    def ranking(self) -> list[int]:
        """The candidates after the base, the best first."""
        means = self.values.mean(axis=(1, 2)) * (1 if self.metric.higher_is_better else -1)
        return sorted(range(1, len(self.candidates)), key=lambda index: -means[index])

    def open_comparisons(self) -> list[OpenComparison]:
        """Returns the differences that these images cannot decide, with the number of images that it would take."""
        after_base = range(1, len(self.candidates))
        against: list[tuple[int, Sequence[int]]] = [(0, after_base)]
        # What has weight 0 draws what the base draws.
        if len(after_base) > 1 and (self.values[1] != self.values[0]).any():
            against.append((1, after_base[1:]))
        if len(after_base) > 2:
            best, second = self.ranking[:2]
            against.append((best, [second]))
        pairs = dict.fromkeys((index, other) for other, indices in against for index in indices)
        return [found for index, other in pairs if (found := self._open_comparison(index, other))]

    def _open_comparison(self, index: int, other: int) -> OpenComparison | None:
        num_images = len(self.cases) * self.num_seeds
        found = self.difference(index, other)
        # Equal images, as those of weight 0 and of the base, are no question.
        if not found.covers_zero or (self.values[index] == self.values[other]).all():
            return None
        # The estimate takes an interval for symmetric, and can so come out below what has just not sufficed.
        needed = max(found.num_needed(num_images), num_images + 1)
        names = self.candidates[index], self.candidates[other]
        return OpenComparison(self.metric.name, *names, num_images, needed if math.isfinite(needed) else None)


def _bounds(found: Interval) -> tuple[float | None, float | None]:
    return (found.low, found.high) if found.has_bounds else (None, None)


def few_prompts(judgements: Sequence[Judgement]) -> list[str]:
    """Returns a warning if a metric has too few prompts for its intervals to be trusted."""
    few = min((len(judgement.cases) for judgement in judgements), default=_FEW_PROMPTS)
    if few >= _FEW_PROMPTS:
        return []
    return [
        f"Some metrics have {few} prompt(s) to judge, too few to trust their intervals; use {_FEW_PROMPTS} or more."
    ]
