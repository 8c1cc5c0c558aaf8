"""How a base that writes text does on samples that are held out, while it is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.config.schema import Config, without_augmentation
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Loaded, LossOutput
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import AudioText, Batch, Chat, Output, Prepared, Request, Sample
from lora_diffusion.core.text import suggestion
from lora_diffusion.data import cache, sample_types
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.runtime.progress import watch
from lora_diffusion.training.hooks import EarlyStop
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import PROGRESS_NAME, read_held_out
from lora_diffusion.workflows import ask, transcribe

LOSS = "loss"
MOST_SCORED = 64
"""Samples that are scored each time: a text is written token by token, which takes longer than a step."""
_SCORES_OF_A_RUN = 10
_AT_ONCE = 16

Losses = Callable[[Batch, torch.Generator, Callable[[Batch, torch.Generator], LossOutput]], LossOutput]
"""Computes the loss that is handed to it as a training step would, without gradient."""
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


@dataclass(frozen=True)
class Validation:
    """Scores the adapter as it is on held-out samples."""

    family: Family
    loaded: Loaded
    samples: Sequence[Sample]
    batches: Sequence[Batch]
    """The same, prepared without augmentation."""
    losses: Losses
    metrics: Sequence[str]
    path: Path
    """Where the scores are written."""
    found: dict[int, Mapping[str, float]] = field(default_factory=dict)

    @property
    def is_better_higher(self) -> bool:
        """Whether the score that decides is better the higher it is."""
        return self.metrics[0] != LOSS and bool(registry.find("metrics", self.metrics[0]).higher_is_better)

    def score(self, step: int) -> float:
        """Measures, and returns what decides, so that higher is better."""
        self.found[step] = {name: round(value, 6) for name, value in self.measure().items()}
        told = ", ".join(f"{name} {value:.4f}" for name, value in self.found[step].items())
        logger.info("step %d  held out: %s", step, told)
        decides = self.found[step][self.metrics[0]]
        return decides if self.is_better_higher else -decides

    def show(self, score: float) -> str:
        """Returns what `score` gave, for people."""
        return f"{self.metrics[0]} {score if self.is_better_higher else -score:.4f}"

    def measure(self) -> dict[str, float]:
        """Returns each metric of the adapter as it is now."""
        values = {LOSS: self._loss()} if LOSS in self.metrics else {}
        if written := [name for name in self.metrics if name != LOSS]:
            result = _COMPARE[self.family.sample_type](self._generate, self.loaded, self.samples)
            values |= {name: float(getattr(result, name)) for name in written}
        return {name: values[name] for name in self.metrics}

    def _generate(self, requests: Sequence[Request]) -> list[Output]:
        chunks = [requests[start : start + _AT_ONCE] for start in range(0, len(requests), _AT_ONCE)]
        bar = watch(chunks, len(chunks), "Scoring held-out samples")
        return [output for chunk in bar for output in self.family.generate(self.loaded, chunk)]

    def _loss(self) -> float:
        plain = partial(self.family.loss, replace(self.loaded, options=without_augmentation(self.loaded.options)))
        total = weight = 0.0
        for index, batch in enumerate(watch(self.batches, len(self.batches), "Loss of held-out samples")):
            per_sample = self.losses(batch, derive(0, "validation", index), plain).per_sample.float().cpu()
            weights = torch.ones(len(batch)) if batch.weights is None else batch.weights
            total += float((per_sample * weights).sum())
            weight += float(weights.sum())
        return total / weight

    def record(self, scores: Sequence[tuple[int, float]]) -> None:
        """Writes all scores of the run; those before it was resumed are in the file already."""
        known = {line["step"]: line for line in read_held_out(self.path)}
        lines = [
            {**known.get(step, {}), "step": step, "score": score, **self.found.get(step, {})} for step, score in scores
        ]
        write_json(self.path, lines)


def prepare(
    config: Config,
    family: Family,
    loaded: Loaded,
    held_out: Sequence[Sample],
    run: RunFolder,
    num_steps: int,
    losses: Losses,
) -> list[EarlyStop]:
    """Returns the hook that scores held-out samples, keeps the best checkpoint, and ends the run as patience says."""
    if not held_out:
        return []
    scored = held_out[:MOST_SCORED]
    if len(scored) < len(held_out):
        logger.info("The first %d of %d held-out samples are scored.", len(scored), len(held_out))
    trained = frozenset(config.adapter.parts)
    data = without_augmentation(config.data)
    items = cache.prepare(family, loaded, scored, trained, config.cache, data)
    validation = Validation(
        family,
        loaded,
        scored,
        _batches(items, family, config.train.batch_size),
        losses,
        metrics(config, sample_types.find(family.sample_type)),
        run.path / PROGRESS_NAME,
    )
    own = config.evaluate
    every = own.every_steps or max(1, num_steps // _SCORES_OF_A_RUN)
    return [
        EarlyStop(every, own.patience, validation.score, validation.record, last_step=num_steps, show=validation.show)
    ]


def _batches(items: Sequence[Prepared], family: Family, batch_size: int) -> list[Batch]:
    groups: defaultdict[str, list[Prepared]] = defaultdict(list)
    for item in items:
        groups[item.group].append(item)
    return [
        family.collate(group[start : start + batch_size])
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]
