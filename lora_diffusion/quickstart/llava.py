"""The whole way on the built-in LLaVA: train a new drawing style, answer before and after, report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion import workflows
from lora_diffusion.config.load import load
from lora_diffusion.config.schema import Config
from lora_diffusion.config.shipped import find_shipped
from lora_diffusion.core.files import shipped_path, write_json
from lora_diffusion.evaluation.answers import Examination
from lora_diffusion.evaluation.text_page import TextPage, write_text_page

_SETS = {"new style": "new", "known styles": "known"}
"""How a set of test questions is called -> its folder in the sample set."""
_NUM_EXAMPLES = 12

Scores = Mapping[str, tuple[Examination, Examination]]
"""Set of questions -> the answers of the base, and those with the adapter."""


@dataclass(frozen=True)
class LlavaResult:
    """What the quickstart left."""

    adapter: Path
    report: Path
    scores: Scores
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
        rows = [
            f"  {name:<16}{before.exact_match:6.1%} before, {after.exact_match:6.1%} after"
            for name, (before, after) in self.scores.items()
        ]
        lines = [
            f"Done in {self.seconds:.0f} s.",
            f"  adapter  {self.adapter}",
            f"  report   {self.report}",
            "Answers about pictures that were not trained on, right to the letter:",
            *rows,
            "Try next:",
            *(f"  {command}" for command in self.next_commands),
        ]
        return "\n".join(lines)


def quickstart(output_path: Path, *, overwrite: bool = False) -> LlavaResult:
    """Trains the held-out style of emoji-questions on the built-in base, and counts the right answers.

    Raises:
        ConfigError: the folder holds another run and `overwrite` is not set.
    """
    started = time.perf_counter()
    data = shipped_path("datasets") / "emoji-questions"
    config = load(find_shipped("llava/emoji"), [f"data.path={data / 'train'}", f"output.path={output_path}"])
    trained = workflows.train(config, overwrite=overwrite)
    scores = compare(config, trained.files[0])
    write_json(output_path / "scores.json", rates(scores))
    report_path, commands = output_path / "report.html", _next_commands(config, trained.files[0])
    seconds = time.perf_counter() - started
    training = workflows.read_training(output_path)
    facts = {**training.facts, "whole quickstart": f"{seconds:.0f} s"}
    write_text_page(report_path, _page(scores), training=replace(training, facts=facts), next_commands=commands)
    return LlavaResult(trained.files[0], report_path, scores, commands, seconds)


def compare(config: Config, adapter: Path) -> dict[str, tuple[Examination, Examination]]:
    """Returns how the base and the adapter answer the test questions of emoji-questions."""
    folders = [shipped_path("datasets") / "emoji-questions" / folder for folder in _SETS.values()]
    before = workflows.examine(config.model, folders)
    after = workflows.examine(config.model, folders, [(adapter, 1.0)])
    return dict(zip(_SETS, zip(before, after, strict=True), strict=True))


def rates(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the scores as plain values."""
    return {
        name: {moment: {key: value for key, value in one.to_json().items() if key != "answers"}
               for moment, one in (("before", before), ("after", after))}
        for name, (before, after) in scores.items()
    }  # fmt: skip


def _page(scores: Scores) -> TextPage:
    rows = []
    for name, (before, after) in scores.items():
        total = (name, "all", len(before.answers), before.exact_match, after.exact_match)
        rows.append((*total, before.token_f1, after.token_f1))
        for question, share in before.by_question.items():
            count = sum(one.question == question for one in before.answers)
            rows.append((name, question, count, share, after.by_question[question], "", ""))
    examples = []
    for before, after in scores.values():
        said = {one.key: one.answer for one in after.answers}
        examples += [(one.question, one.target, one.answer, said[one.key]) for one in before.answers[:_NUM_EXAMPLES]]
    return TextPage(
        title="lora-diffusion quickstart: emoji questions",
        subtitle="The same questions about pictures that were not trained on, before and after training.",
        score_names=("pictures", "question", "number#", "exact before#", "exact after#", "F1 before#", "F1 after#"),
        scores=rows,
        about="Share of answers that are right to the letter, and F1 of the words that answer and target share, "
        "articles left out. Higher is better. The base never saw the new style; the adapter saw other pictures of it.",
        example_names=("question", "right", "answer of the base", "answer with the adapter"),
        examples=examples,
        about_examples="Of each set those that the base answered worst.",
    )


def _next_commands(config: Config, adapter: Path) -> tuple[str, ...]:
    model, file = config.model.path, shlex.quote(str(adapter))
    return (
        f"lora-diffusion ask --model {model} --adapter {file}:1 --question 'What is this?' YOUR_PICTURE.png",
        f"lora-diffusion data caption YOUR_PICTURES --model {model} --adapter {file}:1",
        "lora-diffusion train --config llava/emoji data.path=YOUR_CHATS.json output.path=my-answers",
    )
