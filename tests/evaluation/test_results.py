from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lora_diffusion.core.errors import DataError
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import MetricFacts, Table
from tests.evaluation.sample import CASES, SEEDS, STEPS, WEIGHTS, make_sample


def test_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = make_sample(tmp_path / "one")
    assert len(made.candidates) == 1 + len(STEPS) * len(WEIGHTS)
    assert results.read(tmp_path / "one") == made
    results.write(made, tmp_path / "two")
    for name in ("evaluation.json", "scores.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert isinstance(made.candidates[1].weights, dict)
    assert made.cases == CASES
    assert made.find("base", "clip_text").vs_base_mean is None
    assert made.find("step-000300@1.0", "clip_image").vs_base_mean > 0
    with pytest.raises(KeyError, match="clip_text of base on dreams"):
        made.find("base", "clip_text", "dreams")


def test_every_image_of_the_scores_is_there(tmp_path: Path) -> None:
    made = make_sample(tmp_path)
    named = [score for score in made.scores if score.image]
    assert len({score.image for score in named}) == len(made.candidates) * len(CASES) * len(SEEDS)
    assert all((tmp_path / score.image).is_file() for score in named)
    assert {score.seed for score in made.scores if not score.image} == {None}


def test_evaluations_that_tell_less_are_read(tmp_path: Path) -> None:
    made = make_sample(tmp_path)
    path = tmp_path / "evaluation.json"
    values = json.loads(path.read_text())
    del values["base"]["base_key"], values["versions"]
    for facts in values["metrics"]:
        del facts["judges"]
    path.write_text(json.dumps(values))
    assert results.read(tmp_path) == made


def test_metrics_tell_which_prompts_they_judge(tmp_path: Path) -> None:
    """Those of other packages as well."""
    made = make_sample(tmp_path)
    assert Table(made).has("prior_drift")
    facts = [MetricFacts("strange", "of another package", True, "plain"), MetricFacts("clip_text", "", True, "asked")]
    scores = [
        dataclasses.replace(score, metric="strange") if score.metric == "prior_drift" else score
        for score in made.scores
    ]
    table = Table(dataclasses.replace(made, metrics=facts, scores=scores))
    assert table.has("strange")
    assert table.mean("step-000300@1.5", "strange") == Table(made).mean("step-000300@1.5", "prior_drift")
    assert {case for case, _ in table.values("base", "clip_text")} == {0, 1, 2}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda values: values | {"version": 99}, "version 99"),
        (lambda values: {k: v for k, v in values.items() if k != "version"}, "no whole evaluation"),
        (lambda values: {k: v for k, v in values.items() if k != "cases"}, "no whole evaluation"),
        (lambda values: values | {"more": 1}, "no whole evaluation"),
        (lambda values: [values], "no whole evaluation"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, spoil, reason: str) -> None:  # type: ignore[no-untyped-def]
    make_sample(tmp_path)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=reason):
        results.read(tmp_path)
    with pytest.raises(DataError, match="lora-diffusion evaluate"):
        results.read(tmp_path / "nowhere")
