"""Transcripts and answers compared with what is right, and the page of the Whisper quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_diffusion.core import registry
from lora_diffusion.core.evidence import Evidence
from lora_diffusion.evaluation.texts import evaluate_answers, evaluate_transcripts, whisper_normalizer
from lora_diffusion.quickstart import whisper
from lora_diffusion.report.quickstart_page import write_text_page
from lora_diffusion.report.report_page import Training


class TestNormalizer:
    def test_english_knows_numbers_and_the_spellings_of_the_base(self, tmp_path: Path) -> None:
        assert whisper_normalizer("en", None)("Twenty-one, COLOURS!") == "21 colours"
        (tmp_path / "normalizer.json").write_text(json.dumps({"colours": "colors"}))
        assert whisper_normalizer("en", tmp_path)("Twenty-one, COLOURS!") == "21 colors"

    def test_other_languages_lose_case_and_punctuation(self) -> None:
        assert whisper_normalizer("de", None)("Grün, sagte er.").split() == ["grün", "sagte", "er"]


def test_rates_are_edits_over_length_and_worst_come_first() -> None:
    said = ["go left now", "stop", "up"]
    found = evaluate_transcripts(["a", "b", "c"], said, ["go right now", "stop", "up up up"], [str] * 3)
    assert [(own.key, pytest.approx(own.scores["wer"])) for own in found.texts] == [("c", 2), ("a", 1 / 3), ("b", 0)]
    assert found.scores["wer"] == pytest.approx(3 / 5)
    rows = [{"key": "c", "said": "up", "heard": "up up up", "wer": 2.0}]
    assert [{key: row[key] for key in rows[0]} for row in found.to_json()["recordings"][:1]] == rows
    assert found.lines(most=1) == [
        "WER 60.0%, CER 58.8% over 3 recordings",
        "  200.0%  c: said 'up', heard 'up up up'",
        "  and 1 more with errors",
    ]


def test_page(tmp_path: Path) -> None:
    before = evaluate_transcripts(["a", "b"], ["one <two>", "three"], ["none", "three"], [str, str])
    after = evaluate_transcripts(["a", "b"], ["one <two>", "three"], ["one two", "three"], [str, str])
    page = whisper.TASK.page({"new accent and words": (before, after)})
    training = Training(metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], facts={"adapter.rank": "8"})
    write_text_page(tmp_path / "report.html", page, training=training, next_commands=("do this",))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("one &lt;two&gt;", "one two", "0.667", "0.333", "adapter.rank", "do this", "<svg"):
        assert text in html
    assert "<two>" not in html


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
    result = evaluate_answers(
        ["a", "b", "c"], ["What?", "What?", "Colour?"], ["fox", "red dog", "red"], ["fox", "red cat", "blue"]
    )
    assert [own.key for own in result.texts] == ["c", "b", "a"]
    assert result.scores["exact_match"] == pytest.approx(1 / 3)
    assert result.scores["token_f1"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert result.by_question == {"Colour?": 0.0, "What?": 0.5}
    assert result.rates()["clip_score"] is None
    assert "and 1 more that are wrong" in result.lines(most=1)[-1]
