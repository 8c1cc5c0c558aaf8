"""Trains what is missing, evaluates each set, and writes tables, their numbers and a page with images.

All adapters of a set generate the same prompts from the same noise. What is on the disk is not made again, so that a
run that was stopped goes on, and more seeds or methods may be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.core.files import write_json, write_text
from lora_diffusion.evaluation.results import Evaluation
from lora_diffusion.workflows.bases import find_model
from lora_diffusion.workflows.evaluate import EvaluationRequest, evaluate
from scripts.measure.peers.compositions import CONCEPTS_SHOWN, compare_compositions
from scripts.measure.peers.page import write_comparison_page
from scripts.measure.peers.plain_loop import RECIPES
from scripts.measure.peers.sample_sets import SAMPLE_SETS, SampleSet
from scripts.measure.peers.tables import SetResult, markdown, summary
from scripts.measure.peers.trainings import BASE_MODEL, Trained, Trainings

METRICS = ("match", "style", "clip_image", "clip_text", "prior_drift", "prompt_leak")


@dataclass(frozen=True)
class Sampling:
    """What is generated with each adapter."""

    num_draws: int = 2
    """Images of each prompt."""
    num_prompts: int | None = None
    """Of what was learnt, and as many others; None takes all."""
    num_denoising_steps: int = 25


def measure(
    trainings: Trainings,
    sets: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    compositions: bool = False,
) -> Path:
    """Compares, prints the tables, and returns the page; beside it lie its tables and numbers.

    Args:
        trainings: how adapters are trained, and where they are kept.
        sets: names of SAMPLE_SETS; without any, all.
        methods: names of RECIPES, which are compared with ours; without any, all.
        seeds: of the trainings.
        sampling: what is generated.
        compositions: compare compositions of our adapters, too.
    """
    metrics = [metric for metric in METRICS if metric in registry.available("metrics")]
    results = []
    for name in sets or SAMPLE_SETS:
        one = SAMPLE_SETS[name]
        adapters = trainings.of_set(one, methods or list(RECIPES), seeds)
        evaluation = _evaluate(one, adapters, metrics, sampling, trainings.output / name / "evaluation")
        results.append(SetResult(one, adapters, evaluation))
    composed = compare_compositions(trainings, seeds[0], sampling.num_denoising_steps) if compositions else []
    missing = [metric for metric in (*METRICS, CONCEPTS_SHOWN) if metric not in registry.available("metrics")]
    numbers = summary(results, {one.name: one.scores for one in composed}, missing)
    write_json(trainings.output / "peers.json", numbers)
    write_text(trainings.output / "peers.md", markdown(numbers))
    page = trainings.output / "peers.html"
    write_comparison_page(page, results, composed, numbers)
    print(f"\n{markdown(numbers)}\nImages: {page}", flush=True)
    return page


def _evaluate(
    one: SampleSet, adapters: Sequence[Trained], metrics: Sequence[str], sampling: Sampling, folder: Path
) -> Evaluation:
    request = EvaluationRequest(
        output_path=folder,
        prompts=one.cases(sampling.num_prompts),
        model=find_model(BASE_MODEL),
        adapters=[str(adapter.path) for adapter in adapters],
        references=one.references,
        metrics=metrics,
        seeds=range(sampling.num_draws),
        num_steps=sampling.num_denoising_steps,
    )
    return evaluate(request)
