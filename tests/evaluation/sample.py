"""A small evaluation folder with consistent contents and random images, made without any model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import (
    ALL,
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

STEPS = (100, 200, 300)
WEIGHTS = (0.5, 1.0, 1.5)
SEEDS = (0, 1)
CASES = (
    Case(0, "an emoji of a zwx, noto style", "an emoji of noto style", "an emoji of an octopus", "subject", "sample"),
    Case(1, "an emoji of a zwx, flat style", "an emoji of flat style", "an emoji of an octopus", "subject", "sample"),
    Case(2, "a zwx, flat style", "flat style", "an octopus in flat style", "style", "sample"),
    Case(3, "an emoji of an animal", "an emoji of an animal", "an emoji of an animal", "prior", "sample"),
)
METRICS = (
    MetricFacts("clip_text", "how well the image shows what its prompt says", True),
    MetricFacts("clip_image", "how much the image looks like the references", True),
    MetricFacts("prior_drift", "how far images without the trigger moved from the base's", False),
    MetricFacts("copying", "likeness to the nearest training image", False),
    MetricFacts("diversity", "mean distance of images of one prompt", True),
)
_SET_METRICS = ("diversity",)


def make_sample(folder: Path, seed: int = 0) -> Evaluation:
    """Writes an evaluation of three checkpoints at three weights, and of the base, and returns it.

    Fidelity rises with step and weight, the last checkpoint copies and drifts, alignment falls.
    """
    rng = np.random.default_rng(seed)
    files = _save_images(folder / "training", 3, rng)
    candidates = [Candidate("base", None, None, None, {}, 0.0)]
    for step in STEPS:
        path, digest = f"run/checkpoints/step-{step:06d}", hashlib.sha256(str(step).encode()).hexdigest()
        for weight in WEIGHTS:
            name = f"step-{step:06d}"
            candidates.append(Candidate(f"{name}@{weight}", path, digest, step, {name: weight}, weight))
    scores = [score for candidate in candidates for score in _scores(candidate, folder, files, rng)]
    evaluation = Evaluation(
        base=Base("builtin:emoji", "stable-diffusion-v1", "sd1"),
        scorer={"clip": "builtin:emoji-clip"},
        settings=Settings(25, 5.0, None, ""),
        candidates=candidates,
        cases=CASES,
        seeds=SEEDS,
        metrics=METRICS,
        summary=_summaries(candidates, scores),
        adapters={f"step-{step:06d}": FileHash(f"run/checkpoints/step-{step:06d}", "0" * 64) for step in STEPS},
        references=_save_images(folder / "references", 2, rng),
        training_images=files,
        warnings=("clip_image: 2 candidates cannot be told apart from the base with 6 images each.",),
        open_comparisons=(OpenComparison("clip_image", "step-000100@0.5", "base", 6, 4321.0),),
        random_baseline={"clip_text": 0.05},
        scores=scores,
    )
    results.write(evaluation, folder)
    return results.read(folder)


def _save_images(folder: Path, count: int, rng: np.random.Generator) -> list[FileHash]:
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(count):
        path = folder / f"{index}.png"
        _random_image(rng).save(path)
        found.append(FileHash(str(path), hashlib.sha256(path.read_bytes()).hexdigest()))
    return found


def _random_image(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)


def _level(metric: str, candidate: Candidate) -> float:
    """The mean that a metric has for a candidate: saturating fidelity, falling alignment, late copying."""
    strength = candidate.weight * (candidate.step or 0) / 300
    return {
        "clip_text": 0.7 - 0.25 * strength,
        "clip_image": 0.2 + 0.5 * (1 - np.exp(-3 * strength)),
        "prior_drift": 0.3 * strength**2,
        "copying": 0.5 + 0.45 * min(1.0, strength) ** 3,
        "diversity": 0.5 - 0.2 * strength,
    }[metric]


def _scores(candidate: Candidate, folder: Path, training: list[FileHash], rng: np.random.Generator) -> list[Score]:
    found = []
    for case in CASES:
        names = {}
        for seed in SEEDS:
            key = hashlib.sha256(f"{candidate.name} {case.index} {seed}".encode()).hexdigest()
            names[seed] = f"pictures/{key}.png"
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            _random_image(rng).save(folder / names[seed])
        for metric in METRICS:
            if (metric.name == "prior_drift") != (case.group == "prior"):
                continue
            for seed in (None,) if metric.name in _SET_METRICS else SEEDS:
                found.append(
                    Score(
                        candidate.name,
                        candidate.step,
                        candidate.weight,
                        case.index,
                        case.group,
                        case.prompt,
                        seed,
                        metric.name,
                        round(_level(metric.name, candidate) + 0.04 * float(rng.standard_normal()), 6),
                        "" if seed is None else names[seed],
                        training[case.index % len(training)].path if metric.name == "copying" else "",
                    )
                )
    return found


def _summaries(candidates: list[Candidate], scores: list[Score]) -> list[Summary]:
    found = []
    for metric in METRICS:
        for kind in (*dict.fromkeys(case.group for case in CASES), ALL):
            values = {
                candidate.name: np.array(
                    [
                        score.value
                        for score in scores
                        if (score.candidate, score.metric) == (candidate.name, metric.name)
                        and kind in (ALL, score.group)
                    ]
                )
                for candidate in candidates
            }
            if not len(values["base"]):
                continue
            first = candidates[1].name
            for candidate in candidates:
                own = values[candidate.name]
                base = (None,) * 3 if candidate.name == "base" else _interval(own - values["base"])
                other = (None,) * 3 if candidate.name == first else _interval(own - values[first])
                found.append(Summary(candidate.name, metric.name, kind, *_interval(own), len(own), *base, *other))
    return found


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    mean, half = float(values.mean()), float(1.96 * values.std() / len(values) ** 0.5)
    return round(mean, 6), round(mean - half, 6), round(mean + half, 6)
