from __future__ import annotations

import dataclasses

import pytest

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.evaluation import gates
from lora_diffusion.evaluation.results import Evaluation
from tests.evaluation.sample import make_sample


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return make_sample(tmp_path_factory.mktemp("sample"))


def _failures(evaluation: Evaluation, *texts: str) -> list[str]:
    metrics, names = ([item.name for item in items] for items in (evaluation.metrics, evaluation.candidates))
    return gates.failures([gates.parse(text, metrics, names) for text in texts], evaluation)


def test_without_a_candidate_all_but_the_base_must_hold(evaluation: Evaluation) -> None:
    worst = min(evaluation.find(c.name, "clip_image").mean for c in evaluation.candidates[1:])
    assert evaluation.find("base", "clip_image").mean < worst
    assert _failures(evaluation, f"clip_image>={worst}", f"clip_image >= {worst - 0.01:.6f}") == []
    (line,) = _failures(evaluation, f"clip_image>{worst}")
    name = min(evaluation.candidates[1:], key=lambda c: evaluation.find(c.name, "clip_image").mean).name
    assert line.startswith(f"clip_image>{worst}: {name} has {worst:.4g} (")
    assert len(_failures(evaluation, "clip_image>=2", "clip_text<=-2")) == 18


def test_one_candidate(evaluation: Evaluation) -> None:
    value = evaluation.find("step-000200@1.0", "copying").mean
    assert _failures(evaluation, f"copying@step-000200@1.0<={value}") == []
    assert len(_failures(evaluation, f"copying@step-000200@1.0<{value}")) == 1
    assert len(_failures(evaluation, "clip_image@base>=.9")) == 1


def test_weight_0_is_the_base_and_not_tested(evaluation: Evaluation) -> None:
    none = dataclasses.replace(evaluation.candidates[1], weights={"step-000100": 0.0}, weight=0.0)
    bare = dataclasses.replace(evaluation, candidates=[evaluation.candidates[0], none, *evaluation.candidates[2:]])
    assert len(_failures(bare, "clip_image>=2")) == 8
    assert len(_failures(bare, f"clip_image@{none.name}>=2")) == 1


def test_nothing_to_test_is_no_success(evaluation: Evaluation) -> None:
    none = dataclasses.replace(evaluation.candidates[1], weights={"step-000100": 0.0}, weight=0.0)
    bare = dataclasses.replace(evaluation, candidates=[evaluation.candidates[0], none])
    assert _failures(bare, "clip_image>=-1") == ["clip_image>=-1: no candidate has an adapter"]
    assert _failures(bare, "clip_image@base>=-1") == []


def test_numbers_may_have_an_exponent(evaluation: Evaluation) -> None:
    assert _failures(evaluation, "clip_text>=-1e3", "clip_text<=1.5E+2") == []
    assert len(_failures(evaluation, "prior_drift@step-000300@1.5<=1e-3")) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("clip_image=0.7", "is no condition"),
        ("clip_image>=high", "is no condition"),
        ("0.7<clip_image", "is no condition"),
        ("clip_imag>=0.7", 'no metric clip_imag is evaluated \\(did you mean "clip_image"'),
        ("clip_image@step-000400@1.0>=0.7", "no candidate step-000400@1.0 is evaluated"),
    ],
)
def test_errors(evaluation: Evaluation, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        _failures(evaluation, text)
