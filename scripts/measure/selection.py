"""What the evaluation says of a run that is trained far too long: base, too little, good, too much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from lora_diffusion.config.load import find_shipped, load
from lora_diffusion.core.files import shipped_path
from lora_diffusion.data.preflight import find_images
from lora_diffusion.evaluation.references import read_captions
from lora_diffusion.evaluation.results import BASE, Case, Evaluation, Table
from lora_diffusion.evaluation.select import share
from lora_diffusion.workflows.evaluate import EvaluationRequest, evaluate
from lora_diffusion.workflows.report import report
from lora_diffusion.workflows.select import Selection, select
from lora_diffusion.workflows.train import train

STEPS = (20, 100, 300, 1200)
"""Checkpoints that are compared; the run is stopped at each and continued."""
# Nothing keeps the base as it is, and there is room to learn every picture by heart.
TOO_LONG = (
    "model.prior_weight=0",
    "adapter.rank=32",
    "adapter.targets=[attn,ff,conv]",
    "train.learning_rate=2e-3",
    "train.batch_size=4",
    "train.schedule=constant",
    "train.keep_checkpoints=0",
    "train.save_every_steps=0",
)
FRESH_SEEDS = (100, 101)
"""Of the evaluation that the choice is held against."""
METRICS = ("match", "style", "clip_image", "clip_text", "copying", "prior_drift", "prompt_leak")


class Task(NamedTuple):
    """What is trained, and the prompts that ask for it."""

    data: str
    suite: str
    trigger: str
    class_words: tuple[str, ...] = ()


TASKS = {
    "style": Task("blob-style", "emoji-style", "blob style"),
    "concept": Task("octopus", "emoji-subject", "zwx", ("octopus",)),
}
"""Name of the config -> its task."""


def measure(output: Path, seeds: Sequence[int], changes: Sequence[str]) -> None:
    """Trains, evaluates and selects for each task and seed, and prints a Markdown table of means for each.

    Below it stands how near the choice comes to the best of all candidates with other prompts and seeds.
    """
    for name, task in TASKS.items():
        for seed in seeds:
            run = output / f"selection-{name}-seed{seed}"
            data = shipped_path("datasets") / task.data
            overrides = [f"data.path={data / 'train'}", f"output.path={run}", f"train.seed={seed}"]
            for step in STEPS:
                config = load(find_shipped(f"sd1/{name}"), [*overrides, *TOO_LONG, *changes, f"train.max_steps={step}"])
                train(config, resume=step > STEPS[0], overwrite=step == STEPS[0])
            request = EvaluationRequest(
                output_path=run / "evaluation",
                prompts=task.suite,
                run=run,
                references=data / "references",
                seeds=(0, 1),
                classes=task.class_words,
            )
            evaluation = evaluate(request)
            selection = select(run)
            report([run])
            _print_table(f"{name}, seed {seed}", evaluation, selection)
            fresh = replace(request, output_path=run / "fresh", prompts=_fresh_cases(task), seeds=FRESH_SEEDS)
            _print_best(evaluate(fresh), selection.candidate)


def _fresh_cases(task: Task) -> tuple[Case, ...]:
    """Returns prompts for all references, in other words than the choice was made with."""
    folder = shipped_path("datasets") / task.data / "references"
    images = find_images(str(folder), "references")
    captions = [f"a drawing of {text}" for text in read_captions(str(folder), images, [task.trigger], "references")]
    if task.class_words:
        prompts = [caption.replace(task.class_words[0], task.trigger) for caption in captions]
    else:
        prompts = [f"{caption}, {task.trigger}" for caption in captions]
    pairs = enumerate(zip(prompts, captions, strict=True))
    return tuple(Case(index, prompt, plain, plain, "subject", "fresh") for index, (prompt, plain) in pairs)


def _print_table(title: str, evaluation: Evaluation, selection: Selection) -> None:
    table = Table(evaluation)
    print(f"\n{title}\n\n| candidate | {' | '.join(METRICS)} |\n|{'---|' * (1 + len(METRICS))}")
    for candidate in evaluation.candidates:
        means = [table.mean(candidate.name, metric) for metric in METRICS]
        name = BASE if candidate.step is None else f"step {candidate.step}"
        print(f"| {name} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    references = [evaluation.reference_scores.get(metric) for metric in METRICS]
    print(f"| real pictures | {' | '.join('' if value is None else f'{value:.3f}' for value in references)} |")
    print(f"\n{selection.text()}", flush=True)


def _print_best(evaluation: Evaluation, chosen: str) -> None:
    """Prints how near the choice comes to the best of all candidates with other prompts and seeds."""
    values = exhaustive(evaluation)
    best = max(values, key=lambda name: values[name])
    print(
        f"\nFresh prompts and seeds: {chosen} has {values[chosen]:.3f}, the best, {best}, {values[best]:.3f}: "
        f"{values[chosen] / values[best] - 1:+.1%}.",
        flush=True,
    )


def exhaustive(evaluation: Evaluation) -> dict[str, float]:
    """Returns candidate -> mean of its shares of match (0 at the base, 1 at real images) and style.

    Where the evaluation has no style, that of match alone.
    """
    table, goal = Table(evaluation), evaluation.reference_scores["match"]
    base = table.mean(BASE, "match")
    values = {}
    for candidate in evaluation.candidates:
        shares = [share(table.mean(candidate.name, "match"), base, goal)]
        if table.has("style"):
            shares.append(table.mean(candidate.name, "style"))
        values[candidate.name] = mean(shares)
    return values
