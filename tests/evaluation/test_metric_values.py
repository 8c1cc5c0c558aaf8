from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lora_diffusion.core import registry
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.harness import MetricValues, few_prompts
from lora_diffusion.evaluation.results import ALL, Case
from tests.evaluation.sample import make_sample

METRIC = registry.find("metrics", "clip_text")
CASES = [Case(index, "p", "p", "p", "subject" if index < 6 else "style", "s") for index in range(10)]


def judged(*shifts: float, noise: float = 0.1, seeds: int = 4) -> MetricValues:
    """Candidates whose values are those of the base plus a shift, and noise of their own."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(len(CASES), seeds))
    rows = [base] + [base + shift + noise * rng.normal(size=base.shape) for shift in shifts]
    return MetricValues(METRIC, ["base", *"abcdefgh"[: len(shifts)]], CASES, np.stack(rows), seeds)


def test_differences_are_paired() -> None:
    """The noise of prompts is ten times the difference, and the same for both."""
    summaries = {(s.candidate, s.group): s for s in judged(0.1, 0.2).summaries()}
    assert len(summaries) == 3 * 3
    own, base = summaries["a", ALL], summaries["base", ALL]
    assert own.low < base.mean < own.high
    assert 0.05 < own.vs_base_low < own.vs_base_mean < own.vs_base_high < 0.2
    assert summaries["b", ALL].vs_first_mean == pytest.approx(summaries["b", ALL].mean - own.mean)
    assert base.vs_base_mean is own.vs_first_mean is None
    assert base.vs_first_mean == pytest.approx(-own.vs_base_mean)
    assert own.count == 40
    assert summaries["a", "subject"].count == 24
    parts = [summaries["a", kind] for kind in ("subject", "style")]
    assert own.mean == pytest.approx(sum(part.mean * part.count for part in parts) / 40)


def test_says_which_differences_are_too_small_for_the_sample() -> None:
    assert judged(0.3).open_comparisons() == []
    found = judged(0.3, 0.01).open_comparisons()[0]
    assert (found.metric, found.candidate, found.other, found.num_images) == ("clip_text", "b", "base", 40)
    assert found.num_needed is not None
    assert found.num_needed > 40
    pairs = [(found.candidate, found.other) for found in judged(0.3, 0.301, 0.6, 0.602).open_comparisons()]
    assert pairs == [("b", "a"), ("c", "d")]


def test_a_pair_is_listed_once() -> None:
    """The first after the base may be the best one, too."""
    assert [(found.candidate, found.other) for found in judged(0.6, 0.599, 0.1).open_comparisons()] == [("b", "a")]


def test_needs_more_images_than_were_too_few() -> None:
    """Also where the interval is lopsided and just reaches 0."""
    values = np.array([[[0.0]] * 3, [[-0.001], [0.3], [0.3]]])
    (found,) = MetricValues(METRIC, ["base", "a"], CASES[:3], values, 1).open_comparisons()
    assert (found.num_images, found.num_needed) == (3, 4)


def test_equal_images_are_no_question() -> None:
    same = judged(0.0, noise=0.0)
    assert same.open_comparisons() == []
    (again,) = same.summaries()[-1:]
    assert (again.vs_base_mean, again.vs_base_low, again.vs_base_high) == (0, 0, 0)


def test_one_image_has_no_interval(tmp_path: Path) -> None:
    values = np.array([[[0.1]], [[0.3]], [[0.3]]])
    own = MetricValues(METRIC, ["base", "a", "b"], CASES[:1], values, 1)
    summary = {summary.candidate: summary for summary in own.summaries() if summary.group == ALL}["a"]
    assert (summary.mean, summary.low, summary.high) == (0.3, None, None)
    assert summary.vs_base_mean == pytest.approx(0.2)
    assert summary.vs_base_low is summary.vs_base_high is None
    assert summary.format(".2f") == "0.30"
    found = own.open_comparisons()
    assert [(one.candidate, one.other, one.num_needed) for one in found] == [("a", "base", None), ("b", "base", None)]
    evaluation = dataclasses.replace(make_sample(tmp_path), summary=(summary,), open_comparisons=found)
    results.write(evaluation, tmp_path)
    assert "Infinity" not in (tmp_path / "evaluation.json").read_text()
    assert results.read(tmp_path).summary[0].low is None
    assert list(results.read(tmp_path).open_comparisons) == found


def test_few_prompts() -> None:
    few = MetricValues(METRIC, ["base"], CASES[:2], np.zeros((1, 2, 1)), 1)
    assert few_prompts([judged(0.3)]) == []
    assert few_prompts([few])[0].startswith("Some metrics have 2 prompt(s) to score")
