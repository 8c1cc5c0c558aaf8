"""Scores of held-out samples, of bases that write text, while they are trained: early stopping and the best step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lora_diffusion.config.schema import Config, without_augmentation
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import AudioText, Batch, Chat, Output, Prepared, Request, Sample
from lora_diffusion.core.text import suggestion
from lora_diffusion.data import cache
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.runtime.progress import watch
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import EarlyStop
from lora_diffusion.training.tracking import PROGRESS_NAME, read_held_out
from lora_diffusion.training.trainer import without_gradient
from lora_diffusion.workflows import ask, transcribe

if TYPE_CHECKING:
    from lora_diffusion.workflows.hooks.adapter_files import AdapterFiles

LOSS = "loss"
MOST_SCORED = 64
"""Samples that are scored each time: a text is written token by token, which takes longer than a step."""
_SCORES_OF_A_RUN = 10
_AT_ONCE = 16

Generate = Callable[[Sequence[Request]], Sequence[Output]]
_COMPARE: Mapping[type[Sample], Callable[[Generate, Loaded, Any], Any]] = {
    AudioText: transcribe.compare,
    Chat: lambda generate, _, samples: ask.compare(
        lambda requests: [output.text for output in generate(requests)], samples
    ),
}
"""A family's `sample_type` -> what compares the texts of a base with those of samples."""


def metrics(config: Config, sample_type: SampleType) -> tuple[str, ...]:
    """Returns what is measured; the first one decides.

    Raises:
        ConfigError: `evaluate.metrics` names another score than these texts have.
    """
    known = (LOSS, *sample_type.metrics)
    unknown = [name for name in config.evaluate.metrics if name not in known]
    if unknown:
        raise ConfigError(
            f"evaluate.metrics: {unknown[0]} is no score of data.validation{suggestion(unknown[0], known)}; use "
            f"{', '.join(known)}."
        )
    return config.evaluate.metrics or (sample_type.metrics[0], LOSS, *sample_type.metrics[1:])


class HeldOutScores(EarlyStop):
    """Scores held-out samples at every n-th step and the last, keeps the best, and ends the run as patience says."""

    generates = True

    def __init__(self, run: CheckedRun, loaded: Loaded, files: AdapterFiles) -> None:
        """Takes the base as it will be at each step, and what writes the adapter of the best one."""
        evaluate = run.config.evaluate
        every = evaluate.every_steps or max(1, run.num_steps // _SCORES_OF_A_RUN)
        super().__init__(
            every, evaluate.patience, self._score_step, self._write, last_step=run.num_steps, show=self._text
        )
        self._run, self._loaded, self._files = run, loaded, files
        self._samples = run.held_out[:MOST_SCORED]
        self._batches: Sequence[Batch] = ()
        self._metrics = metrics(run.config, run.sample_type)
        self._path = run.folder.path / PROGRESS_NAME
        self._values: dict[int, Mapping[str, float]] = {}

    def prepare(self) -> None:
        """Prepares the samples as those of training, without augmentation."""
        run, config = self._run, self._run.config
        if len(self._samples) < len(run.held_out):
            logger.info("The first %d of %d held-out samples are scored.", len(self._samples), len(run.held_out))
        data = without_augmentation(config.data)
        items = cache.prepare(run.family, self._loaded, self._samples, run.trained, config.cache, data)
        self._batches = _batches(items, run.family, config.train.batch_size)

    def finish(self, step: int) -> None:
        """Writes the adapter of the best step."""
        self._files.write_best(self.kept_step, step)

    def measure(self) -> dict[str, float]:
        """Returns each metric of the adapter as it is now."""
        values = {LOSS: self._mean_loss()} if LOSS in self._metrics else {}
        if of_texts := [name for name in self._metrics if name != LOSS]:
            result = _COMPARE[self._run.family.sample_type](self._generate, self._loaded, self._samples)
            values |= {name: result.scores[name] for name in of_texts}
        return {name: values[name] for name in self._metrics}

    @property
    def _is_better_higher(self) -> bool:
        deciding = self._metrics[0]
        return deciding != LOSS and bool(registry.find("metrics", deciding).higher_is_better)

    def _score_step(self, step: int) -> float:
        """Measures, and returns the metric that decides, so that higher is better."""
        values = {name: round(value, 6) for name, value in self.measure().items()}
        self._values[step] = values
        logger.info("step %d  held out: %s", step, ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        deciding = values[self._metrics[0]]
        return deciding if self._is_better_higher else -deciding

    def _text(self, score: float) -> str:
        return f"{self._metrics[0]} {score if self._is_better_higher else -score:.4f}"

    def _write(self, scores: Sequence[tuple[int, float]]) -> None:
        """Writes all scores of the run; those before it was resumed are in the file already."""
        known = {line["step"]: line for line in read_held_out(self._path)}
        lines = [
            {**known.get(step, {}), "step": step, "score": score, **self._values.get(step, {})}
            for step, score in scores
        ]
        write_json(self._path, lines)

    def _generate(self, requests: Sequence[Request]) -> list[Output]:
        chunks = [requests[start : start + _AT_ONCE] for start in range(0, len(requests), _AT_ONCE)]
        bar = watch(chunks, len(chunks), "Scoring held-out samples")
        return [output for chunk in bar for output in self._run.family.generate(self._loaded, chunk)]

    def _mean_loss(self) -> float:
        loaded = replace(self._loaded, options=without_augmentation(self._loaded.options))
        losses = without_gradient(self._run.loss(loaded), self._run.config.train.precision, loaded.device)
        total = weight = 0.0
        for index, batch in enumerate(watch(self._batches, len(self._batches), "Loss of held-out samples")):
            per_sample = losses(batch, derive(0, "validation", index)).per_sample.float().cpu()
            weights = torch.ones(len(batch)) if batch.weights is None else batch.weights
            total += float((per_sample * weights).sum())
            weight += float(weights.sum())
        return total / weight


def hooks(run: CheckedRun, loaded: Loaded, files: AdapterFiles) -> list[HeldOutScores]:
    """Returns the hook, if samples are held out."""
    return [HeldOutScores(run, loaded, files)] if run.held_out else []


def _batches(items: Sequence[Prepared], family: Family, batch_size: int) -> list[Batch]:
    groups: defaultdict[str, list[Prepared]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return [
        family.collate(group[start : start + batch_size])
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
