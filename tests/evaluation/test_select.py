from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.evaluation.results import (
    Base,
    Candidate,
    Case,
    Evaluation,
    FileHash,
    MetricFacts,
    Score,
    Settings,
    Table,
)
from lora_diffusion.evaluation.select import Preference, check_metrics, choose, frontier, limits
from tests.evaluation.sample import make_sample

CASES = tuple(Case(i, f"a zwx cat {i}", f"a cat {i}", f"a cat {i}", "subject", "s") for i in range(8))
PLAIN = Case(8, "a dog", "a dog", "a dog", "prior", "s")
BASE_SCORES = {"clip_image": 0.2, "clip_text": 0.7, "copying": 0.4, "prior_drift": 0.0, "prompt_leak": 0.0}


def evaluation(
    *candidates: tuple[int, float, float, float],
    noise: Callable[[int, int], float] = lambda case, seed: 0.0,
    more: dict[int, dict[str, float]] | None = None,
) -> Evaluation:
    """An evaluation of (step, weight, likeness, text) whose images all score alike but for the noise.

    Args:
        noise: (case, seed) -> what is added to every second candidate's scores.
        more: step -> other scores of its candidates.
    """
    listed = [Candidate("base", None, None, None, {}, 0.0)]
    values = {"base": BASE_SCORES}
    for step, weight, likeness, text in candidates:
        name = f"step-{step:06d}@{weight:g}"
        listed.append(Candidate(name, f"run/{step}", "0", step, {"a": weight}, weight))
        values[name] = BASE_SCORES | {"clip_image": likeness, "clip_text": text} | (more or {}).get(step, {})
    scores = []
    for index, candidate in enumerate(listed):
        for metric, value in values[candidate.name].items():
            cases = (PLAIN,) if metric.startswith("pr") else CASES
            scores += [
                Score(
                    candidate.name, candidate.step, candidate.weight, c.index, c.group, c.prompt, seed, metric, own, ""
                )
                for c in cases
                for seed in (0, 1)
                for own in [value + (noise(c.index, seed) if index % 2 else 0.0)]
            ]
    return Evaluation(
        base=Base("builtin:emoji", "stable-diffusion-v1", "sd1"),
        scorer={"clip": "x"},
        settings=Settings(25, 5.0, None, ""),
        candidates=listed,
        cases=(*CASES, PLAIN),
        seeds=(0, 1),
        metrics=[MetricFacts(name, name, name != "copying") for name in BASE_SCORES],
        summary=(),
        random_baseline={"clip_text": 0.0, "prior_drift": 0.4},
        reference_scores={"clip_image": 0.7, "copying": 0.6},
        scores=scores,
    )


def test_shares_and_balance_equal_a_computation_by_hand() -> None:
    choice = choose(evaluation((100, 1.0, 0.45, 0.63)))
    score = choice.score
    assert score.likeness_share == pytest.approx((0.45 - 0.2) / (0.7 - 0.2))
    assert score.text_share == pytest.approx(0.63 / 0.7)
    assert score.balance == pytest.approx(2 / (1 / 0.5 + 1 / 0.9))
    leaning = choose(evaluation((100, 1.0, 0.45, 0.63)), Preference(text_weight=0.2))
    assert leaning.score.balance == pytest.approx(1 / (0.8 / 0.5 + 0.2 / 0.9))


def test_text_is_measured_against_what_the_references_reach_with_their_captions() -> None:
    """No image of this style reaches the base's 0.7: against it, the earliest would win for what it has not learnt."""
    made = evaluation((100, 1.0, 0.36, 0.66), (200, 1.0, 0.5, 0.42), (300, 1.0, 0.52, 0.2))
    assert choose(made).candidate.step == 200
    assert choose(made, Preference(text_weight=0.8)).candidate.step == 100
    captioned = dataclasses.replace(made, reference_scores={**made.reference_scores, "clip_text": 0.4})
    choice = choose(captioned, Preference(text_weight=0.8))
    assert choice.candidate.step == 200
    assert [score.text_share for score in choice.scores] == [1, 1, pytest.approx(0.5)]
    assert "100% of the text alignment of real images (0.400) with clip_text 0.420" in choice.sentences[0]
    assert "of the best text alignment with" in choose(made).sentences[0]
    nonsense = dataclasses.replace(made, reference_scores={**made.reference_scores, "clip_text": -0.1})
    assert choose(nonsense) == choose(made)


@pytest.mark.parametrize(("num_matched", "metric"), [(8, "match"), (4, "match"), (3, "clip_image")])
def test_likeness_is_that_to_the_same_subject_where_most_prompts_have_a_reference(
    num_matched: int, metric: str
) -> None:
    made = evaluation((100, 1.0, 0.5, 0.6), (200, 1.0, 0.6, 0.6))
    match = {"base": 0.2, "step-000100@1": 0.6, "step-000200@1": 0.3}
    scores = [
        dataclasses.replace(score, metric="match", value=match[score.candidate])
        for score in made.scores
        if score.metric == "clip_image" and score.case < num_matched  # type: ignore[operator]
    ]
    facts = [*made.metrics, MetricFacts("match", "match", True)]
    made = dataclasses.replace(made, scores=[*made.scores, *scores], metrics=facts)
    choice = choose(made)
    assert choice.likeness_metric == metric
    assert choice.candidate.step == (100 if metric == "match" else 200)
    assert choose(made, Preference(likeness="match")).likeness_metric == "match"


def test_overtrained_and_undertrained_lose_to_the_middle() -> None:
    made = evaluation((100, 1.0, 0.3, 0.7), (200, 1.0, 0.55, 0.65), (300, 1.0, 0.65, 0.5), (400, 1.0, 0.69, 0.3))
    choice = choose(made)
    assert choice.candidate.name == "step-000200@1"
    assert all(score.on_frontier for score in choice.scores)
    assert "70% of the way" in choice.sentences[0]
    assert "0.550" in choice.sentences[0]
    assert "step-000300@1, has 0.650 and 0.500" in choice.sentences[1]
    assert choice.warnings == ()


def test_weights_of_the_user_move_the_choice() -> None:
    made = evaluation((100, 1.0, 0.3, 0.7), (200, 1.0, 0.55, 0.65), (300, 1.0, 0.69, 0.35))
    assert choose(made, Preference(text_weight=0.05)).candidate.step == 300
    assert choose(made, Preference(text_weight=0.99)).candidate.step == 100


def test_beaten_candidates_are_off_the_frontier() -> None:
    choice = choose(evaluation((100, 1.0, 0.5, 0.6), (200, 1.0, 0.45, 0.55), (300, 1.0, 0.55, 0.5)))
    assert [score.on_frontier for score in choice.scores] == [True, False, True]
    assert "1 is beaten" in choice.sentences[1]


def test_frontier_keeps_equal_points() -> None:
    assert frontier([(1, 1), (1, 1), (0, 1), (1, 0)]) == [0, 1]


def test_copy_is_not_chosen_however_alike_it_is() -> None:
    made = evaluation((100, 1.0, 0.5, 0.6), (200, 1.0, 0.7, 0.68), more={200: {"copying": 0.65}})
    choice = choose(made)
    assert choice.candidate.step == 100
    assert choice.find("step-000200@1").breaks == ("copying",)
    assert "1 breaks a limit (copying 1)" in choice.sentences[1]
    assert choose(made, Preference(copying=0.7)).candidate.step == 200


def test_default_limits_come_from_base_and_real_images() -> None:
    made = evaluation((100, 1.0, 0.5, 0.6))
    found = {limit.metric: limit.value for limit in limits(made, Preference())}
    assert found == {"copying": 0.6, "prior_drift": pytest.approx(0.2), "prompt_leak": pytest.approx(0.25)}
    without = limits(dataclasses.replace(made, reference_scores={}), Preference(prior_drift=0.05))
    unmeasured = [score for score in made.scores if score.metric != "prior_drift"]
    with pytest.raises(ConfigError, match="no scores of prior_drift"):
        limits(dataclasses.replace(made, scores=unmeasured), Preference(prior_drift=0.05))
    assert {limit.metric: limit.value for limit in without} == {"copying": pytest.approx(0.7), "prior_drift": 0.05}


def test_references_that_were_trained_on_say_nothing_about_copies() -> None:
    made = evaluation((100, 1.0, 0.5, 0.6))
    own, other = FileHash("a.png", "1"), FileHash("b.png", "2")
    found = {}
    for references in ([other], [own, other]):
        known = dataclasses.replace(made, training_images=[own], references=references)
        found[len(references)] = {limit.metric: limit.value for limit in limits(known, Preference())}["copying"]
    assert found == {1: 0.6, 2: pytest.approx((0.4 + 1) / 2)}


def test_limits_that_could_not_be_measured_are_said() -> None:
    made = evaluation((100, 1.0, 0.3, 0.7), (200, 1.0, 0.55, 0.65), (300, 1.0, 0.6, 0.5))
    kept = [score for score in made.scores if score.metric not in ("copying", "prior_drift")]
    warnings = choose(dataclasses.replace(made, scores=kept)).warnings
    assert warnings == ("copying, prior_drift could not be measured, so that nothing limited it.",)


def test_metrics_that_allow_no_choice_are_refused() -> None:
    check_metrics(())
    check_metrics(("clip_text", "dino_image"))
    for names, message in ((("clip_imag", "clip_text"), "clip_image"), (("clip_text",), "needs clip_text and")):
        with pytest.raises(ConfigError, match=message):
            check_metrics(names)


def test_default_limit_that_nobody_keeps_is_lifted_and_said() -> None:
    drift = {100: {"prior_drift": 0.5}, 200: {"prior_drift": 0.6}}
    made = evaluation((100, 1.0, 0.4, 0.7), (200, 1.0, 0.6, 0.65), more=drift)
    choice = choose(made)
    assert choice.candidate.step == 200
    assert any("No candidate keeps prior_drift" in warning for warning in choice.warnings)
    with pytest.raises(ConfigError, match=r"prior_drift <= 0.3.*nearest is step-000100@1 with 0.500"):
        choose(made, Preference(prior_drift=0.3))


def test_ties_go_to_the_earlier_and_then_to_the_lower_weight() -> None:
    def noise(case: int, seed: int) -> float:
        return 0.2 if (case + seed) % 2 else -0.2

    apart = choose(evaluation((100, 1.0, 0.59, 0.6), (200, 1.0, 0.6, 0.59)))
    assert apart.tied == ("step-000200@1",)
    tied = choose(evaluation((100, 1.0, 0.59, 0.6), (200, 1.0, 0.6, 0.59), noise=noise))
    assert set(tied.tied) == {"step-000100@1", "step-000200@1"}
    assert tied.candidate.step == 100
    weights = choose(evaluation((100, 1.3, 0.6, 0.59), (100, 0.7, 0.59, 0.6), noise=noise))
    assert weights.candidate.weight == 0.7


def test_ends_of_the_run_are_warned_about() -> None:
    rising = choose(evaluation((100, 1.0, 0.3, 0.7), (200, 1.0, 0.6, 0.7)))
    assert any("longer run" in warning for warning in rising.warnings)
    falling = choose(evaluation((100, 1.0, 0.6, 0.7), (200, 1.0, 0.6, 0.4)))
    assert any("save_every_steps" in warning for warning in falling.warnings)


def test_nothing_learnt_is_warned_about() -> None:
    choice = choose(evaluation((100, 1.0, 0.15, 0.7), (200, 1.0, 0.1, 0.6)))
    assert choice.candidate.step == 100
    assert any("base alone" in warning for warning in choice.warnings)


def test_evaluation_that_allows_no_choice_is_refused() -> None:
    made = evaluation((100, 1.0, 0.5, 0.6))
    for metric in ("clip_image", "clip_text"):
        scores = [score for score in made.scores if score.metric != metric]
        with pytest.raises(DataError, match=metric):
            choose(dataclasses.replace(made, scores=scores))
    with pytest.raises(DataError, match="base alone"):
        choose(dataclasses.replace(made, candidates=made.candidates[:1]))


def test_difference_is_over_equal_draws() -> None:
    table = Table(evaluation((100, 1.0, 0.5, 0.6), (200, 1.0, 0.4, 0.6), noise=lambda case, seed: 0.1 * case))
    difference = table.difference("step-000100@1", "step-000200@1", "clip_image")
    assert difference.mean == pytest.approx(0.1 + 0.1 * 3.5)
    assert difference.low < difference.mean < difference.high
    assert math.isnan(table.difference("step-000100@1", "nobody", "clip_image").mean)


def test_choice_of_the_sample_is_the_same_each_time(tmp_path: Path) -> None:
    made = make_sample(tmp_path)
    assert choose(made).to_json() == choose(made).to_json()
    assert choose(made).candidate.name == "step-000100@1.5"
    assert {"step-000300@1.0", "step-000300@1.5"} <= {s.name for s in choose(made).scores if s.breaks}
