"""Two of our adapters at once: both on the base, one file composed of both, and that file cut to a lower rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.evaluation.results import Case, Evaluation, Table
from lora_diffusion.workflows.bases import find_model
from lora_diffusion.workflows.compose import compose
from lora_diffusion.workflows.evaluate import EvaluationRequest, evaluate
from scripts.measure.peers.sample_sets import SAMPLE_SETS, SampleSet
from scripts.measure.peers.trainings import BASE_MODEL, Trainings

PAIRS = (
    ("quendle-style", "guitar"),
    ("octopus", "guitar"),
    ("octopus", "cupcake"),
    ("quendle-style", "octopus"),
    ("mavrok-style", "octopus"),
)
"""A style and a concept, two concepts, and one concept in two styles."""
_STYLED = ("an emoji of a {1}, {0}", "{0} {1}", "a {0} picture of a {1}", "a {1} in {0}")
_TOGETHER = ("an emoji of a {0} and a {1}", "a {0} and a {1}", "a picture of a {1} and a {0}", "a {0} with a {1}")
_NUM_DRAWS = 8
_RANK = 8
CONCEPTS_SHOWN = "concepts_shown"
_METRICS = (CONCEPTS_SHOWN, "clip_text")


@dataclass(frozen=True)
class Composed:
    """What two adapters generate together."""

    name: str
    evaluation: Evaluation
    candidates: Mapping[str, str]
    """How they were put together, or which of them is alone -> candidate of the evaluation."""
    folder: Path
    """Of the evaluation."""

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Way to put them together -> metric -> mean."""
        table = Table(self.evaluation)
        metrics = [metric.name for metric in self.evaluation.metrics]
        return {
            way: {metric: table.mean(candidate, metric) for metric in metrics}
            for way, candidate in self.candidates.items()
        }


def compare_compositions(trainings: Trainings, seed: int, num_denoising_steps: int) -> list[Composed]:
    """Returns each of PAIRS, of adapters that the shipped configs train with one seed."""
    return [_compare(trainings, seed, num_denoising_steps, *(SAMPLE_SETS[name] for name in pair)) for pair in PAIRS]


def _compare(
    trainings: Trainings, seed: int, num_denoising_steps: int, first: SampleSet, second: SampleSet
) -> Composed:
    name = f"{first.name} and {second.name}"
    folder = trainings.output / "compositions" / f"{first.name}-{second.name}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [trainings.ours(one, seed).path for one in (first, second)]
    files = {"composed": folder / "composed.safetensors", f"composed, rank {_RANK}": folder / "cut.safetensors"}
    for path, rank in zip(files.values(), (None, _RANK), strict=True):
        compose([(one, 1.0) for one in paths], path, rank=rank, overwrite=True)
    alone = {one.stem: f"{one.stem}@1.0" for one in paths}
    together = "+".join(f"{one.stem}:1" for one in paths)
    candidates = {"both live": f"{together}@1.0", **{way: f"{path.stem}@1.0" for way, path in files.items()}, **alone}
    request = EvaluationRequest(
        output_path=folder / "evaluation",
        prompts=list(_cases(first, second)),
        model=find_model(BASE_MODEL),
        adapters=["+".join(f"{one}:1" for one in paths), *map(str, (*files.values(), *paths))],
        references=second.references,
        concepts=[f"{'subject' if one.subject else 'style'}:{one.trigger}={one.references}" for one in (first, second)],
        metrics=[metric for metric in _METRICS if metric in registry.available("metrics")],
        seeds=range(_NUM_DRAWS),
        num_steps=num_denoising_steps,
    )
    return Composed(name, evaluate(request), candidates, folder / "evaluation")


def _cases(first: SampleSet, second: SampleSet) -> Iterator[Case]:
    for index, template in enumerate(_TOGETHER if first.subject else _STYLED):
        prompt = template.format(first.trigger, second.trigger)
        # The scorer has never heard of the style.
        known = template.format(first.subject, second.subject) if first.subject else f"an emoji of a {second.subject}"
        yield Case(index, prompt, known, known, "composition", "peers")
