"""The quickstart of text-output models: train on a sample set, score the texts before and after, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.load import find_shipped, load
from lora_diffusion.config.schema import Config
from lora_diffusion.core.files import shipped_path, write_json
from lora_diffusion.evaluation.texts import SetScores, TextEvaluation
from lora_diffusion.report.quickstart_page import TextPage, write_text_page
from lora_diffusion.workflows.report import read_training
from lora_diffusion.workflows.train import train

NUM_EXAMPLES = 12
"""Of each test set, on the page."""

Scores = Mapping[str, tuple[TextEvaluation, TextEvaluation]]
"""Test set -> its scores by the base, and with the adapter."""


@dataclass(frozen=True)
class TextQuickstart:
    """What is trained, and how it is scored."""

    config: str
    """Shipped config."""
    data: str
    """Sample set; its folder `train` is trained on."""
    tests: Mapping[str, str]
    """How a test set is called -> its folder in the sample set."""
    score: Callable[..., SetScores[Any]]
    """(options of the base, folders, adapters) -> the scores of each folder."""
    metric: str
    """The score that the summary shows."""
    heading: str
    """What that score says."""
    page: Callable[[Scores], TextPage]
    commands: Callable[[str, str], Sequence[str]]
    """(base, adapter with its weight) -> command lines to try."""


@dataclass(frozen=True)
class TextQuickstartResult:
    """What the quickstart left."""

    adapter: Path
    report: Path
    scores: Scores
    metric: str
    heading: str
    next_commands: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "adapter": str(self.adapter),
            "report": str(self.report),
            "scores": rates(self.scores),
            "next": list(self.next_commands),
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        """Returns lines for people."""
        width = max(map(len, self.scores)) + 2
        rows = [
            f"  {name:<{width}}{before.scores[self.metric]:6.1%} before, {after.scores[self.metric]:6.1%} after"
            for name, (before, after) in self.scores.items()
        ]
        lines = [
            f"Done in {self.seconds:.0f} s.",
            f"  adapter  {self.adapter}",
            f"  report   {self.report}",
            self.heading,
            *rows,
            "Try next:",
            *(f"  {command}" for command in self.next_commands),
        ]
        return "\n".join(lines)


def quickstart(
    task: TextQuickstart, output_path: Path, *, resume: bool = False, overwrite: bool = False
) -> TextQuickstartResult:
    """Trains, scores the test sets before and after, and writes adapter, scores and page.

    Raises:
        ConfigError: the folder holds another run, and neither `resume` nor `overwrite` is set.
    """
    started = time.perf_counter()
    config = config_of(task, output_path)
    adapter = train(config, resume=resume, overwrite=overwrite).files[0]
    scores = compare(task, config, adapter)
    write_json(output_path / "scores.json", rates(scores))
    report_path, commands = output_path / "report.html", tuple(task.commands(config.model.path, f"{adapter}:1"))
    seconds = time.perf_counter() - started
    training = read_training(output_path)
    facts = {**training.facts, "whole quickstart": f"{seconds:.0f} s"}
    write_text_page(report_path, task.page(scores), training=replace(training, facts=facts), next_commands=commands)
    return TextQuickstartResult(adapter, report_path, scores, task.metric, task.heading, commands, seconds)


def config_of(task: TextQuickstart, output_path: Path, changes: Sequence[str] = ()) -> Config:
    """Returns the shipped config on the sample set; `changes` are key=value."""
    defaults = [f"data.path={_data(task) / 'train'}", f"output.path={output_path}"]
    return load(find_shipped(task.config), [*defaults, *changes])


def compare(task: TextQuickstart, config: Config, adapter: Path) -> Scores:
    """Returns the scores of each test set without and with the adapter."""
    folders = [_data(task) / folder for folder in task.tests.values()]
    before = task.score(config.model, folders).scores
    after = task.score(config.model, folders, [(adapter, 1.0)]).scores
    return dict(zip(task.tests, zip(before, after, strict=True), strict=True))


def rates(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the scores as plain values, without those of single texts."""
    return {name: {"before": before.rates(), "after": after.rates()} for name, (before, after) in scores.items()}


def _data(task: TextQuickstart) -> Path:
    return shipped_path("datasets") / task.data
