"""The one harness: images of all candidates from the same prompts and noise, what the metrics say, how sure that is.

Read `run` first: it leaves an evaluation folder. `compare_conditions` is the short form, in memory, for the quickstart.
Neither sees a base model: images come from a function that generates. Both take their requests from a `PromptGrid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.evidence import Concept, Evidence, Scores
from lora_diffusion.core.files import remove_leftovers
from lora_diffusion.core.protocols.metric import Metric
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.data.images import grid as image_table
from lora_diffusion.evaluation import results, sampling
from lora_diffusion.evaluation.concepts import NamedConcept, file_paths
from lora_diffusion.evaluation.references import counterparts
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
from lora_diffusion.evaluation.sampling import Generate, Look
from lora_diffusion.evaluation.statistics import Interval, MeanWithError, interval, mean_with_error
from lora_diffusion.runtime.device import process_group
from lora_diffusion.scoring.image_encoding import BATCH
from lora_diffusion.scoring.metrics.clip_image import METRIC as CLIP_IMAGE
from lora_diffusion.scoring.metrics.clip_text import METRIC as CLIP_TEXT
from lora_diffusion.scoring.scorers import Scorers

GenerateLoaded = Callable[[Sequence[Request]], Sequence[Output]]
"""Generates requests with what the base carries."""
_FEW_PROMPTS = 5
"""With fewer, resampling cannot know how much prompts differ."""


@dataclass(frozen=True)
class MetricValues:
    """The values of one metric, of all candidates."""

    metric: Metric
    candidates: Sequence[str]
    """The base is the first."""
    cases: Sequence[Case]
    """Those that the metric is about."""
    values: NDArray[np.float64]
    """[candidates, cases, seeds]; one seed if the metric gives one value for each prompt."""
    num_seeds: int
    """Images behind each case."""

    def summaries(self) -> list[Summary]:
        """Returns means, intervals and paired differences of each candidate, for each group of cases and for all."""
        groups = (*dict.fromkeys(case.group for case in self.cases), ALL)
        return [self._summary(index, group) for group in groups for index in range(len(self.candidates))]

    def difference(self, index: int, other: int, group: str = ALL) -> Interval:
        """Returns how much more one candidate has than another with the same prompts and noise."""
        rows = self._rows(group)
        return interval(rows[index] - rows[other])

    def _rows(self, group: str) -> NDArray[np.float64]:
        return self.values[:, [group in (case.group, ALL) for case in self.cases]]

    def _summary(self, index: int, group: str) -> Summary:
        mean = interval(self._rows(group)[index])
        differences: list[float | None] = []
        low, high = _bounds(mean)
        for other in (0, 1):
            if index == other or other >= len(self.candidates):
                differences += [None] * 3
            else:
                difference = self.difference(index, other, group)
                differences += [difference.mean, *_bounds(difference)]
        count = self._rows(group)[index].size
        return Summary(self.candidates[index], self.metric.name, group, mean.mean, low, high, count, *differences)

    @cached_property
    def ranking(self) -> list[int]:
        """The candidates after the base, the best first."""
        means = self.values.mean(axis=(1, 2)) * (1 if self.metric.higher_is_better else -1)
        return sorted(range(1, len(self.candidates)), key=lambda index: -means[index])

    def open_comparisons(self) -> list[OpenComparison]:
        """Returns the differences that these images cannot decide, with the number of images that it would take."""
        after_base = range(1, len(self.candidates))
        against: list[tuple[int, Sequence[int]]] = [(0, after_base)]
        # What has weight 0 generates what the base does.
        if len(after_base) > 1 and (self.values[1] != self.values[0]).any():
            against.append((1, after_base[1:]))
        if len(after_base) > 2:
            best, second = self.ranking[:2]
            against.append((best, [second]))
        pairs = dict.fromkeys((index, other) for other, indices in against for index in indices)
        comparisons = (self._open_comparison(index, other) for index, other in pairs)
        return [comparison for comparison in comparisons if comparison]

    def _open_comparison(self, index: int, other: int) -> OpenComparison | None:
        num_images = len(self.cases) * self.num_seeds
        difference = self.difference(index, other)
        # Equal images, as those of weight 0 and of the base, are no question.
        if not difference.covers_zero or (self.values[index] == self.values[other]).all():
            return None
        # The estimate takes an interval for symmetric, and can so come out below what has just not sufficed.
        needed = max(difference.num_needed(num_images), num_images + 1)
        names = self.candidates[index], self.candidates[other]
        return OpenComparison(self.metric.name, *names, num_images, needed if math.isfinite(needed) else None)


def _bounds(mean: Interval) -> tuple[float | None, float | None]:
    return (mean.low, mean.high) if mean.has_bounds else (None, None)


def few_prompts(measured: Sequence[MetricValues]) -> list[str]:
    """Returns a warning if a metric has too few prompts for its intervals to be trusted."""
    few = min((len(values.cases) for values in measured), default=_FEW_PROMPTS)
    if few >= _FEW_PROMPTS:
        return []
    return [
        f"Some metrics have {few} prompt(s) to score, too few to trust their intervals; use {_FEW_PROMPTS} or more."
    ]


IMAGES = "pictures"
"""Folder of the images in that of an evaluation."""
_PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch")
"""Packages whose version can change an image or a score in its last digits."""


@dataclass(frozen=True)
class PromptGrid:
    """What every candidate generates: each case with each seed, the seeds of the first case first."""

    cases: Sequence[Case]
    seeds: Sequence[int]
    template: Request
    """Steps, guidance, size and negative prompt; prompt and seed are filled in."""

    def places(self) -> list[tuple[Case, int]]:
        """Returns case and seed of each image."""
        return [(case, seed) for case in self.cases for seed in self.seeds]

    def prompts(self, *, control: bool = False) -> list[str]:
        """Returns the prompt of each image, or its control prompt."""
        return [case.control_prompt if control else case.prompt for case, _ in self.places()]

    def requests(self, *, control: bool = False, weights: Mapping[str, float] | None = None) -> list[Request]:
        """Returns what to generate, without adapter weights unless they are given."""
        pairs = zip(self.prompts(control=control), self.places(), strict=True)
        return [replace(self.template, prompt=prompt, seed=seed, weights=weights) for prompt, (_, seed) in pairs]

    def evidence(self, images: Sequence[Path | Image], **more: Any) -> Evidence:
        """Returns what metrics score of a candidate's images; `more` are other fields of Evidence."""
        places = self.places()
        captions, cases = [case.scoring_caption for case, _ in places], [case.index for case, _ in places]
        return Evidence(images=images, scoring_captions=captions, cases=cases, **more)


def measure(metrics: Sequence[Metric], evidence: Evidence) -> dict[str, Scores]:
    """Returns metric -> its scores of one candidate."""
    return {metric.name: metric.score(evidence) for metric in metrics}


@dataclass(frozen=True)
class Task:
    """All that decides the outcome of an evaluation."""

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
    reference_captions: Sequence[str] = ()
    """As in Evidence."""
    training_images: Sequence[FileHash] = ()
    concepts: Sequence[NamedConcept] = ()
    """What a composition is to show together."""
    warnings: Sequence[str] = ()
    """What was seen before anything was generated."""

    def cases_of(self, metric: Metric) -> list[Case]:
        """Returns the cases that a metric is about."""
        return [case for case in self.cases if case.is_control == (metric.outputs == "control")]

    @property
    def _template(self) -> Request:
        settings = self.settings
        return Request("", 0, settings.negative, settings.num_steps, settings.guidance, settings.size)

    def grid(self, metric: Metric | None = None) -> PromptGrid:
        """Returns what every candidate generates, or the part of it that a metric is about."""
        return PromptGrid(self.cases if metric is None else self.cases_of(metric), self.seeds, self._template)

    def base_requests(self) -> dict[tuple[int, int], Request]:
        """Returns what the base alone generates beside references; no case has such indices."""
        wanted = chain.from_iterable(self.counterparts().values())
        return {
            (-1 - index, seed): replace(self._template, prompt=prompt, seed=seed)
            for index, (prompt, seed) in enumerate(wanted)
        }

    def counterparts(self) -> dict[str, list[tuple[str, int]]]:
        """Returns prompt and seed of what the base alone generates, as far as a metric needs it.

        The keys are the triggers of the concepts that are styles, and "" for the references of the evaluation.
        """
        needs = {name for metric in self.metrics for name in metric.needs}
        sets = {"": (self.references, self.reference_captions)} if "base_references" in needs else {}
        if "concepts" in needs:
            styles = [concept for concept in self.concepts if concept.is_style]
            sets |= {style.trigger: (style.references, style.reference_captions) for style in styles}
        controls = [case.control_prompt for case in self.cases if not case.is_control]
        return {
            name: counterparts(captions, len(references), controls, self.seeds[0])
            for name, (references, captions) in sets.items()
            if controls
        }


def run(task: Task, generate: Generate, scorers: Scorers, folder: Path, cache: Path | None = None) -> Evaluation:
    """Generates what is missing, scores all, and writes the evaluation.

    Under `accelerate launch` each process generates and encodes its share, and all return the same.

    Args:
        task: what is evaluated.
        generate: generates requests with the adapters of a candidate.
        scorers: the models that score, made with `encode_shared`.
        folder: gets `images/`, `scores.csv` and `evaluation.json`; all processes must see it.
        cache: folder of images that evaluations share.
    """
    group = process_group()
    grid = task.grid()
    requests = dict(zip([(case.index, seed) for case, seed in grid.places()], grid.requests(), strict=True))
    sheet = sampling.lay_out(task.base.base_key, task.looks, requests, task.base_requests())
    group.wait_for_everyone()  # until then another process may be writing its machine.json
    if group.is_main_process:
        # Not those of the cache: another evaluation may be writing there.
        remove_leftovers(folder)
        remove_leftovers(folder / IMAGES)
    group.wait_for_everyone()
    share = group.process_index, group.num_processes
    sampling.generate_missing(sheet.chunks, folder / IMAGES, cache, generate, share)
    group.wait_for_everyone()
    evaluation = _score(task, _SampledImages(task, sheet.keys, folder, scorers))
    if group.is_main_process:
        results.write(evaluation, folder)
    group.wait_for_everyone()
    return evaluation


def encode_shared(function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
    """Returns what a function gives for all items, [num_items, dim]; processes share the batches of a single one."""
    group = process_group()
    if group.num_processes == 1:
        return function(items)
    share = range(0, len(items), BATCH)[group.process_index :: group.num_processes]
    parts = gather_object([(start, function(items[start : start + BATCH])) for start in share])
    return torch.cat([rows for _, rows in sorted(parts, key=lambda part: part[0])])


@dataclass(frozen=True)
class _SampledImages:
    """The generated images as metrics want them."""

    task: Task
    keys: Mapping[sampling.Place, str]
    folder: Path
    scorers: Scorers

    def evidence(self, candidate: str, metric: Metric) -> Evidence:
        """Returns what a metric scores of a candidate."""
        grid = self.task.grid(metric)

        def images(name: str) -> list[Path]:
            return [self._path(name, case, seed) for case, seed in grid.places()]

        return grid.evidence(
            images(candidate),
            base_images=images(BASE),
            prompts=grid.prompts(),
            concepts=[
                Concept(
                    concept.trigger,
                    concept.is_style,
                    file_paths(concept.references),
                    self.base_references.get(concept.trigger, []),
                    [images(name) for name in concept.alone],
                )
                for concept in self.task.concepts
            ],
            references=file_paths(self.task.references),
            reference_captions=self.task.reference_captions,
            base_references=self.base_references.get("", []),
            training_images=file_paths(self.task.training_images),
            scorers=self.scorers,
        )

    @cached_property
    def base_references(self) -> dict[str, list[Path]]:
        """The base's own images beside references, by the keys of `Task.counterparts`."""
        keys = iter([self.keys[BASE, index, seed] for index, seed in self.task.base_requests()])
        sets = self.task.counterparts().items()
        return {name: [sampling.image_path(self.folder / IMAGES, next(keys)) for _ in wanted] for name, wanted in sets}

    def lines(self, candidate: Candidate, metric: Metric, scores: Scores) -> Iterator[Score]:
        """Yields the lines of scores.csv; a value that is NaN has none."""
        seeds: Sequence[int | None] = [None] if metric.per_prompt else self.task.seeds
        places = [(case, seed) for case in self.task.cases_of(metric) for seed in seeds]
        details = scores.details or [""] * len(places)
        for (case, seed), value, detail in zip(places, scores.values.tolist(), details, strict=True):
            if math.isnan(value):
                continue
            path = "" if seed is None else self._path(candidate.name, case, seed).relative_to(self.folder).as_posix()
            facts = candidate.name, candidate.step, candidate.weight, case.index, case.group, case.prompt, seed
            yield Score(*facts, metric.name, value, path, detail)

    def _path(self, candidate: str, case: Case, seed: int) -> Path:
        return sampling.image_path(self.folder / IMAGES, self.keys[candidate, case.index, seed])


def _score(task: Task, images: _SampledImages) -> Evaluation:
    """Lets the metrics score images that are there."""
    _encode_all(task, images)
    names = [candidate.name for candidate in task.candidates]
    scores = {
        metric.name: _without_gaps(task, metric, [metric.score(images.evidence(name, metric)) for name in names])
        for metric in task.metrics
    }
    metrics = [metric for metric in task.metrics if not scores[metric.name][0].values.isnan().all()]
    minded = [line for metric in task.metrics for line in scores[metric.name][0].warnings]
    measured = [_metric_values(task, metric, scores[metric.name]) for metric in metrics]
    base = {metric.name: images.evidence(BASE, metric) for metric in metrics}
    baselines = {metric.name: metric.random_baseline(base[metric.name]) for metric in metrics}
    references = {metric.name: metric.reference_score(base[metric.name]) for metric in metrics}
    return Evaluation(
        base=task.base,
        scorer=task.scorers,
        settings=task.settings,
        candidates=task.candidates,
        cases=task.cases,
        seeds=task.seeds,
        metrics=[_facts(metric, scores[metric.name][0]) for metric in metrics],
        summary=[summary for values in measured for summary in values.summaries()],
        adapters=task.adapters,
        references=task.references,
        reference_captions=task.reference_captions,
        training_images=task.training_images,
        warnings=[*task.warnings, *minded, *few_prompts(measured)],
        open_comparisons=[comparison for values in measured for comparison in values.open_comparisons()],
        random_baseline={name: value for name, value in baselines.items() if value is not None},
        reference_scores={name: value for name, value in references.items() if value is not None},
        versions={package: version(package) for package in _PACKAGES},
        scores=[
            line
            for index, candidate in enumerate(task.candidates)
            for metric in metrics
            for line in images.lines(candidate, metric, scores[metric.name][index])
        ],
    )


def _facts(metric: Metric, scores: Scores) -> MetricFacts:
    outputs = results.OUTPUTS[metric.outputs]
    return MetricFacts(metric.name, metric.meaning, metric.higher_is_better, outputs, scores.remark)


def _without_gaps(task: Task, metric: Metric, scores: Sequence[Scores]) -> list[Scores]:
    """Makes all values of a case NaN where one of a candidate is, so that candidates are compared on the same cases."""
    values = torch.stack([row.values for row in scores]).reshape(len(scores), len(task.cases_of(metric)), -1)
    gaps = values.isnan().any(dim=2).any(dim=0)
    filled = values.masked_fill(gaps[None, :, None], torch.nan).flatten(start_dim=1)
    return [replace(row, values=row_values) for row, row_values in zip(scores, filled, strict=True)]


def _encode_all(task: Task, images: _SampledImages) -> None:
    """Encodes all images at once, so that the batches are full."""
    roles = dict.fromkeys(role for metric in task.metrics for role in metric.scorers if role in ("clip", "dino"))
    paths = [sampling.image_path(images.folder / IMAGES, key) for key in dict.fromkeys(images.keys.values())]
    others = [Path(file.path) for file in (*task.references, *task.training_images)]
    for role in roles:
        images.scorers.see(role, [*paths, *others])


def _metric_values(task: Task, metric: Metric, scores: Sequence[Scores]) -> MetricValues:
    cases = task.cases_of(metric)
    values = torch.stack([row.values for row in scores]).double().numpy().reshape(len(scores), len(cases), -1)
    kept = ~np.isnan(values).any(axis=(0, 2))
    cases = [case for case, is_kept in zip(cases, kept, strict=True) if is_kept]
    names = [candidate.name for candidate in task.candidates]
    return MetricValues(metric, names, cases, values[:, kept], len(task.seeds))


WITH_BASE, WITH_ADAPTER = "base, with trigger", "adapter, with trigger"
WITHOUT_BASE, WITHOUT_ADAPTER = "base, without trigger", "adapter, without trigger"
REFERENCES = "real pictures"
_CONDITIONS = (
    (WITH_BASE, False, 0.0),
    (WITH_ADAPTER, False, 1.0),
    (WITHOUT_BASE, True, 0.0),
    (WITHOUT_ADAPTER, True, 1.0),
)
"""Label, whether control prompts are taken, and the weight of the adapter."""


@dataclass(frozen=True)
class Condition:
    """Images of one condition and their mean scores."""

    label: str
    images: tuple[Image, ...]
    scores: Mapping[str, MeanWithError]


@dataclass(frozen=True)
class Comparison:
    """One adapter against the base, on concept and on control prompts; equal positions share case and seed."""

    grid: PromptGrid
    conditions: tuple[Condition, ...]
    references: Condition
    """The references themselves: what a perfect adapter would score."""
    scorer: str

    def condition(self, label: str) -> Condition:
        """Returns the condition of that label."""
        return next(condition for condition in self.conditions if condition.label == label)

    def sheet(self, indices: Sequence[int]) -> Image:
        """Returns the images at these indices side by side: a row for each prompt, a column for each condition."""
        rows = [[condition.images[index] for condition in self.conditions] for index in indices]
        pairs = list(zip(self.grid.prompts(), self.grid.prompts(control=True), strict=True))
        labels = [f"{prompt} / {control}" for prompt, control in (pairs[index] for index in indices)]
        return image_table(rows, labels, [condition.label for condition in self.conditions])

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        """Returns condition -> metric -> mean and half_width."""
        return {
            condition.label: {name: vars(mean) for name, mean in condition.scores.items()}
            for condition in (*self.conditions, self.references)
        }


def compare_conditions(
    grid: PromptGrid,
    generate: GenerateLoaded,
    adapter: str,
    scorers: Scorers,
    references: Sequence[Path | Image],
) -> Comparison:
    """Generates every case with and without trigger, with and without adapter, and scores the images.

    The intervals are those of independent images, and not the resampled ones of `run`: each label of a page and of
    scores.json is about so few prompts and seeds that resampling them would say no more.

    Args:
        grid: at least one case.
        generate: the family's generate on a base that carries the adapter.
        adapter: name of the adapter on the base.
        scorers: the CLIP, which is not the one that the base reads its prompts with.
        references: images of what was trained, but not those that were trained on.
    """
    metrics = (CLIP_IMAGE, CLIP_TEXT)
    conditions = []
    for label, control, weight in _CONDITIONS:
        outputs = generate(grid.requests(control=control, weights={adapter: weight}))
        images = tuple(output.image for output in outputs)
        scores = measure(metrics, grid.evidence(images, references=references, scorers=scorers))
        means = {name: mean_with_error(values.values) for name, values in scores.items()}
        conditions.append(Condition(label, images, means))
    likeness = CLIP_IMAGE.of_references(Evidence(references=references, scorers=scorers))
    goal = Condition(REFERENCES, (), {CLIP_IMAGE.name: mean_with_error(likeness.values)})
    return Comparison(grid, tuple(conditions), goal, scorers.names["clip"])
