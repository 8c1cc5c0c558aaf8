"""The scores of an evaluation, looked up by candidate and metric."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lora_diffusion.evaluation.results import Evaluation, MetricFacts
from lora_diffusion.evaluation.statistics import Interval, interval, nested_interval
from lora_diffusion.evaluation.suites import PLAIN_KINDS

if TYPE_CHECKING:
    pass


_ABOUT_PLAIN = ("prior_drift", "prompt_leak")
"""Metrics of what was not asked for, where an evaluation does not tell what its metrics judge."""
Draw = tuple[int | None, int | None]
"""Index of the case, and seed; a seed of None stands for all pictures of the case."""


class Table:
    """Means and paired differences over the cases that a metric is about.

    Metrics that judge "plain" prompts, such as prior_drift, are about those that do not ask for what was trained, all
    others about those that do.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        """Sorts the scores once."""
        self._values: dict[tuple[str, str], dict[Draw, float]] = defaultdict(dict)
        plain = {facts.name for facts in evaluation.metrics if _judges_plain(facts)}
        for score in evaluation.scores:
            if (score.kind in PLAIN_KINDS) == (score.metric in plain):
                self._values[score.candidate, score.metric][score.case, score.seed] = score.value

    def has(self, metric: str) -> bool:
        """Says whether the metric was measured on such cases."""
        return any(metric == own for _, own in self._values)

    def values(self, candidate: str, metric: str) -> Mapping[Draw, float]:
        """Returns the scores of a candidate; none where it was not measured."""
        return self._values.get((candidate, metric), {})

    def mean(self, candidate: str, metric: str) -> float:
        """Returns the mean, NaN where there is no score."""
        values = self.values(candidate, metric)
        return sum(values.values()) / len(values) if values else math.nan

    def interval(self, candidate: str, metric: str) -> Interval:
        """Returns the mean with its 95 % interval."""
        return _interval(self.values(candidate, metric))

    def difference(self, one: str, other: str, metric: str) -> Interval:
        """Returns the mean of `one` minus `other` over pictures of equal prompt and seed, with its 95 % interval."""
        own, against = self.values(one, metric), self.values(other, metric)
        return _interval({draw: own[draw] - against[draw] for draw in own if draw in against})


def _judges_plain(facts: MetricFacts) -> bool:
    return facts.judges == "plain" if facts.judges else facts.name in _ABOUT_PLAIN


def paired(one: Table, other: Table, candidates: tuple[str, str], metric: str, cases: Mapping[int, int]) -> Interval:
    """Returns the mean difference of a candidate of one evaluation from that of another, with its 95 % interval.

    Args:
        one: minuend.
        other: subtrahend.
        candidates: names in both.
        metric: the same in both.
        cases: index of a case in `one` -> index of the case with the same prompt in `other`.
    """
    own, against = one.values(candidates[0], metric), other.values(candidates[1], metric)
    shared: dict[Draw, float] = {
        (case, seed): value - against[cases[case], seed]
        for (case, seed), value in own.items()
        if case is not None and case in cases and (cases[case], seed) in against
    }
    return _interval(shared)


def _interval(values: Mapping[Draw, float]) -> Interval:
    """Returns the interval over the cases that have most seeds."""
    cases: dict[int | None, dict[int | None, float]] = defaultdict(dict)
    for (case, seed), value in values.items():
        cases[case][seed] = value
    longest = max(map(len, cases.values()), default=0)
    rows = [row for row in cases.values() if len(row) == longest]
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    if any(row.keys() != rows[0].keys() for row in rows):
        return nested_interval(np.array([list(row.values()) for row in rows]))
    return interval(np.array([[row[seed] for seed in rows[0]] for row in rows]))
