"""Answers about pictures, compared with what is right."""

from __future__ import annotations

import pytest

from lora_diffusion.core import registry
from lora_diffusion.core.evidence import Evidence
from lora_diffusion.evaluation.answers import judge


@pytest.mark.parametrize(
    ("answer", "target", "f1"),
    [
        ("A red fox.", "the red fox", 1.0),
        ("a red dog", "a red fox", 0.5),
        ("red red", "red", 2 / 3),
        ("", "red", 0.0),
        ("the", "a", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_token_f1_by_hand(answer: str, target: str, f1: float) -> None:
    scores = registry.find("metrics", "token_f1").score(Evidence(answers=[answer], targets=[target]))
    assert scores.values.tolist() == pytest.approx([f1])


def test_worst_answers_come_first_and_questions_are_counted_apart() -> None:
    found = judge(["a", "b", "c"], ["What?", "What?", "Colour?"], ["fox", "red dog", "red"], ["fox", "red cat", "blue"])
    assert [one.key for one in found.answers] == ["c", "b", "a"]
    assert found.exact_match == pytest.approx(1 / 3)
    assert found.token_f1 == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.by_question == {"Colour?": 0.0, "What?": 0.5}
    assert found.clip_score is None
    assert "and 1 more that are wrong" in found.lines(most=1)[-1]
