"""An evaluation: pictures of all candidates from the same prompts and noise, what the metrics say, how sure that is.

Read `run` first. It never sees a base model: pictures come from a function that draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from lora_diffusion.core.device import process_group
from lora_diffusion.core.files import remove_leftovers
from lora_diffusion.core.protocols import Metric
from lora_diffusion.core.types import Evidence, Request, Scores
from lora_diffusion.evaluation import drawing, results
from lora_diffusion.evaluation.drawing import Draw, Look
from lora_diffusion.evaluation.encoding import BATCH
from lora_diffusion.evaluation.judgement import Judgement, few_prompts
from lora_diffusion.evaluation.results import (
    BASE,
    Base,
    Candidate,
    Case,
    Evaluation,
    FileHash,
    MetricFacts,
    Score,
    Settings,
)
from lora_diffusion.evaluation.scorers import Scorers
from lora_diffusion.evaluation.suites import PLAIN_KINDS

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
    sheet = drawing.lay_out(task.base.base_key, task.looks, _requests(task))
    group.wait_for_everyone()  # until then another process may be writing its machine.json
    if group.is_main_process:
        # Not those of the cache: another evaluation may be writing there.
        remove_leftovers(folder)
        remove_leftovers(folder / PICTURES)
    group.wait_for_everyone()
    share = group.process_index, group.num_processes
    drawing.draw_missing(sheet.chunks, folder / PICTURES, cache, draw, share)
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
    keys: Mapping[drawing.Place, str]
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
        return drawing.picture_path(self.folder / PICTURES, self.keys[candidate, case.index, seed])


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
    paths = [drawing.picture_path(pictures.folder / PICTURES, key) for key in dict.fromkeys(pictures.keys.values())]
    real = [Path(file.path) for file in (*task.references, *task.training_pictures)]
    for kind in kinds:
        pictures.scorers.see(kind, [*paths, *real])


def _judgement(task: Task, metric: Metric, found: Sequence[Scores]) -> Judgement:
    cases = task.judged(metric)
    values = torch.stack([scores.values for scores in found]).double().numpy().reshape(len(found), len(cases), -1)
    return Judgement(metric, [candidate.name for candidate in task.candidates], cases, values, len(task.seeds))
