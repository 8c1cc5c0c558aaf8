"""Means of each method over prompts and training seeds, and how much ours differ from them with the same of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_diffusion.evaluation.results import BASE, Evaluation
from lora_diffusion.evaluation.statistics import interval
from lora_diffusion.report.rendering import number
from scripts.measure.peers.sample_sets import SampleSet
from scripts.measure.peers.trainings import OURS, Trained


@dataclass(frozen=True)
class SetResult:
    """The adapters of a set and what the evaluation says of them."""

    sample_set: SampleSet
    adapters: Sequence[Trained]
    evaluation: Evaluation

    @property
    def labels(self) -> list[str]:
        """What is compared, ours first."""
        return list(dict.fromkeys(adapter.arm.label for adapter in self.adapters))

    def of(self, label: str) -> list[Trained]:
        """Returns the adapters of a label, one for each training seed."""
        return [adapter for adapter in self.adapters if adapter.arm.label == label]

    def metrics(self) -> list[str]:
        """Returns what was measured."""
        return [metric.name for metric in self.evaluation.metrics]

    def values(self, metric: str, candidates: Sequence[str]) -> NDArray[np.float64]:
        """Returns the means over the images of each prompt, [prompts, candidates]."""
        found: dict[tuple[int | None, str], list[float]] = defaultdict(list)
        for score in self.evaluation.scores:
            if score.metric == metric:
                found[score.case, score.candidate].append(score.value)
        prompts = sorted({case for case, _ in found}, key=lambda case: -1 if case is None else case)
        return np.array([[np.mean(found[case, name]) for name in candidates] for case in prompts])

    def of_label(self, metric: str, label: str) -> NDArray[np.float64]:
        """Returns what a method scores, [prompts, training seeds]."""
        return self.values(metric, [candidate_name(adapter) for adapter in self.of(label)])


def candidate_name(adapter: Trained) -> str:
    """Returns what an evaluation calls an adapter at its default weight."""
    return f"{adapter.path.stem}@1.0"


def summary(
    results: Sequence[SetResult], compositions: Mapping[str, Any], missing_metrics: Sequence[str]
) -> dict[str, Any]:
    """Returns all numbers, as plain values; compositions are pair -> way to put it together -> metric -> mean."""
    return {
        "missing_metrics": list(missing_metrics),
        "sets": {result.sample_set.name: _set_summary(result) for result in results},
        "differences": dict(_differences(results)),
        "compositions": dict(compositions),
    }


def _set_summary(result: SetResult) -> dict[str, Any]:
    methods = {}
    for label in result.labels:
        adapters = result.of(label)
        methods[label] = {
            "steps": float(np.mean([adapter.num_steps for adapter in adapters])),
            "cpu_s": float(np.mean([adapter.cpu_s for adapter in adapters])),
            "seeds": [adapter.arm.seed for adapter in adapters],
            "scores": {metric: float(result.of_label(metric, label).mean()) for metric in result.metrics()},
        }
    base = {metric: float(result.values(metric, [BASE]).mean()) for metric in result.metrics()}
    return {"methods": methods, "base": base, "real": dict(result.evaluation.reference_scores)}


def _differences(results: Sequence[SetResult]) -> Iterator[tuple[str, Any]]:
    """Yields (a set or all sets of a kind, method -> metric -> how much more ours have, with its interval)."""
    groups: dict[str, list[SetResult]] = {result.sample_set.name: [result] for result in results}
    for kind in dict.fromkeys(result.sample_set.kind for result in results):
        groups[f"all {kind}s"] = [result for result in results if result.sample_set.kind == kind]
    for name, group in groups.items():
        labels = [label for label in group[0].labels if label != OURS]
        metrics = [metric for metric in group[0].metrics() if all(metric in one.metrics() for one in group)]
        yield name, {label: {metric: _difference(group, metric, label) for metric in metrics} for label in labels}


def _difference(group: Sequence[SetResult], metric: str, label: str) -> Mapping[str, float]:
    """Returns ours less another's; prompts of all sets are resampled, and training seeds apart from them."""
    rows = [result.of_label(metric, OURS) - result.of_label(metric, label) for result in group]
    found = interval(np.concatenate(rows))
    return {"mean": found.mean, "low": found.low, "high": found.high}


def markdown(numbers: Mapping[str, Any]) -> str:
    """Returns the numbers of `summary` as tables."""
    lines = []
    for name, columns, rows in tables(numbers):
        lines += [f"### {name}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    if numbers["missing_metrics"]:
        lines += [f"Not measured, since this version lacks it: {', '.join(numbers['missing_metrics'])}.", ""]
    return "\n".join(lines)


def tables(numbers: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yields (title, columns, rows) of each set, then of the differences and of each composition."""
    for name, one in numbers["sets"].items():
        metrics = list(one["base"])
        rows = [["base", "", "", *(number(one["base"][metric]) for metric in metrics)]]
        for label, values in one["methods"].items():
            cost = [f"{values['steps']:.0f}", f"{values['cpu_s']:.0f}"]
            rows.append([label, *cost, *(number(values["scores"][metric]) for metric in metrics)])
        rows.append(["real pictures", "", "", *(number(one["real"].get(metric)) for metric in metrics)])
        yield name, ["method", "steps", "CPU s", *metrics], rows
    for name, methods in numbers["differences"].items():
        metrics = list(next(iter(methods.values()), {}))
        rows = [[label, *(_cell(values[metric]) for metric in metrics)] for label, values in methods.items()]
        if rows:
            yield f"{name}: ours less the other, with 95 % intervals", ["method", *metrics], rows
    for name, ways in numbers["compositions"].items():
        metrics = list(next(iter(ways.values())))
        yield name, ["adapters", *metrics], [[way, *map(number, scores.values())] for way, scores in ways.items()]


def _cell(difference: Mapping[str, float]) -> str:
    low, high = (number(difference[bound], "+") for bound in ("low", "high"))
    return f"{number(difference['mean'], '+')} ({low} to {high})"
