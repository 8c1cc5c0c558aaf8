"""An evaluation: pictures of all candidates from the same prompts and noise, what the metrics say, how sure that is.

Read `run` first. It never sees a base model: pictures come from a function that draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.files import remove_leftovers
from lora_diffusion.core.protocols.metric import Metric
from lora_diffusion.core.samples import Request
from lora_diffusion.evaluation import results, sampling
from lora_diffusion.evaluation.results import (
    ALL,
    BASE,
    Base,
    Candidate,
    Case,
    Evaluation,
    FileHash,
    MetricFacts,
    OpenComparison,
    Score,
    Settings,
    Summary,
)
from lora_diffusion.evaluation.sampling import Draw, Look
from lora_diffusion.evaluation.statistics import Interval, interval
from lora_diffusion.evaluation.suites import PLAIN_KINDS
from lora_diffusion.runtime.device import process_group
from lora_diffusion.scoring.encoding import BATCH
from lora_diffusion.scoring.scorers import Scorers

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


PICTURES = "pictures"
_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")
"""Packages whose version can change a picture or a score in its last digits."""


@dataclass(frozen=True)
class Task:
    """All that decides what an evaluation finds."""

    base: Base
    candidates: Sequence[Candidate]
    """The base alone comes first."""
    looks: Mapping[str, Look]
    """Candidate -> content hashes and weights of its adapters."""
    adapters: Mapping[str, FileHash]
    cases: Sequence[Case]
    seeds: Sequence[int]
    settings: Settings
    metrics: Sequence[Metric]
    scorers: Mapping[str, str]
    references: Sequence[FileHash] = ()
    training_pictures: Sequence[FileHash] = ()
    warnings: Sequence[str] = ()
    """What was seen before anything was drawn."""

    def judged(self, metric: Metric) -> list[Case]:
        """Returns the cases that a metric is about."""
        return [case for case in self.cases if (case.kind in PLAIN_KINDS) == (metric.judges == "plain")]


def run(task: Task, draw: Draw, scorers: Scorers, folder: Path, cache: Path | None = None) -> Evaluation:
    """Draws what is missing, scores all, and writes the evaluation.

    Under `accelerate launch` each process draws and encodes its share, and all return the same.

    Args:
        task: what is evaluated.
        draw: draws requests with the adapters of a candidate.
        scorers: the models that score, made with `encode_shared`.
        folder: gets `pictures/`, `scores.csv` and `evaluation.json`; all processes must see it.
        cache: folder of pictures that evaluations share.
    """
    group = process_group()
    sheet = sampling.lay_out(task.base.base_key, task.looks, _requests(task))
    group.wait_for_everyone()  # until then another process may be writing its machine.json
    if group.is_main_process:
        # Not those of the cache: another evaluation may be writing there.
        remove_leftovers(folder)
        remove_leftovers(folder / PICTURES)
    group.wait_for_everyone()
    share = group.process_index, group.num_processes
    sampling.draw_missing(sheet.chunks, folder / PICTURES, cache, draw, share)
    group.wait_for_everyone()
    evaluation = _score(task, _Pictures(task, sheet.keys, folder, scorers))
    if group.is_main_process:
        results.write(evaluation, folder)
    group.wait_for_everyone()
    return evaluation


def encode_shared(function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
    """Returns what a function gives for all items, computed by all processes in the very batches of a single one."""
    group = process_group()
    if group.num_processes == 1:
        return function(items)
    own = range(0, len(items), BATCH)[group.process_index :: group.num_processes]
    parts = gather_object([(start, function(items[start : start + BATCH])) for start in own])
    return torch.cat([rows for _, rows in sorted(parts, key=lambda part: part[0])])


def _requests(task: Task) -> dict[tuple[int, int], Request]:
    settings = task.settings
    template = Request("", 0, settings.negative, settings.num_steps, settings.guidance, settings.size)
    return {
        (case.index, seed): replace(template, prompt=case.prompt, seed=seed)
        for case in task.cases
        for seed in task.seeds
    }


@dataclass(frozen=True)
class _Pictures:
    """The drawn pictures as metrics want them."""

    task: Task
    keys: Mapping[sampling.Place, str]
    folder: Path
    scorers: Scorers

    def evidence(self, candidate: str, metric: Metric) -> Evidence:
        """Returns what a metric judges of a candidate: the seeds of the first case, then those of the second, ..."""
        places = [(case, seed) for case in self.task.judged(metric) for seed in self.task.seeds]
        return Evidence(
            pictures=[self._path(candidate, case, seed) for case, seed in places],
            meanings=[case.meaning for case, _ in places],
            cases=[case.index for case, _ in places],
            base_pictures=[self._path(BASE, case, seed) for case, seed in places],
            references=[Path(reference.path) for reference in self.task.references],
            training_pictures=[Path(picture.path) for picture in self.task.training_pictures],
            scorers=self.scorers,
        )

    def lines(self, candidate: Candidate, metric: Metric, scores: Scores) -> Iterator[Score]:
        """Yields the lines of scores.csv."""
        seeds: Sequence[int | None] = [None] if metric.per_prompt else self.task.seeds
        places = [(case, seed) for case in self.task.judged(metric) for seed in seeds]
        details = scores.details or [""] * len(places)
        for (case, seed), value, detail in zip(places, scores.values.tolist(), details, strict=True):
            path = "" if seed is None else self._path(candidate.name, case, seed).relative_to(self.folder).as_posix()
            facts = candidate.name, candidate.step, candidate.weight, case.index, case.kind, case.prompt, seed
            yield Score(*facts, metric.name, value, path, detail)

    def _path(self, candidate: str, case: Case, seed: int) -> Path:
        return sampling.picture_path(self.folder / PICTURES, self.keys[candidate, case.index, seed])


def _score(task: Task, pictures: _Pictures) -> Evaluation:
    """Lets the metrics judge pictures that are there."""
    _encode_all(task, pictures)
    metrics, names = task.metrics, [candidate.name for candidate in task.candidates]
    found = {metric.name: [metric.score(pictures.evidence(name, metric)) for name in names] for metric in metrics}
    judgements = [_judgement(task, metric, found[metric.name]) for metric in metrics]
    base = {metric: pictures.evidence(BASE, metric) for metric in metrics}
    return Evaluation(
        base=task.base,
        scorer=task.scorers,
        settings=task.settings,
        candidates=task.candidates,
        cases=task.cases,
        seeds=task.seeds,
        metrics=[MetricFacts(own.name, own.meaning, own.higher_is_better, own.judges) for own in metrics],
        summary=[summary for judgement in judgements for summary in judgement.summaries()],
        adapters=task.adapters,
        references=task.references,
        training_pictures=task.training_pictures,
        warnings=[*task.warnings, *few_prompts(judgements)],
        open_comparisons=[found for judgement in judgements for found in judgement.open_comparisons()],
        chance={metric.name: value for metric in metrics if (value := metric.chance(base[metric])) is not None},
        real={metric.name: value for metric in metrics if (value := metric.real(base[metric])) is not None},
        versions={package: version(package) for package in _PACKAGES},
        scores=[
            line
            for index, candidate in enumerate(task.candidates)
            for metric in metrics
            for line in pictures.lines(candidate, metric, found[metric.name][index])
        ],
    )


def _encode_all(task: Task, pictures: _Pictures) -> None:
    """Encodes all pictures at once, so that the batches are full."""
    kinds = dict.fromkeys(kind for metric in task.metrics for kind in metric.scorers if kind in ("clip", "dino"))
    paths = [sampling.picture_path(pictures.folder / PICTURES, key) for key in dict.fromkeys(pictures.keys.values())]
    real = [Path(file.path) for file in (*task.references, *task.training_pictures)]
    for kind in kinds:
        pictures.scorers.see(kind, [*paths, *real])


def _judgement(task: Task, metric: Metric, found: Sequence[Scores]) -> Judgement:
    cases = task.judged(metric)
    values = torch.stack([scores.values for scores in found]).double().numpy().reshape(len(found), len(cases), -1)
    return Judgement(metric, [candidate.name for candidate in task.candidates], cases, values, len(task.seeds))
