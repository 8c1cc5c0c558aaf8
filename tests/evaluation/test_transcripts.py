"""Error rates of transcripts, and the page of the Whisper quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_diffusion.evaluation.transcripts import judge, normaliser
from lora_diffusion.quickstart import whisper
from lora_diffusion.report.pages import Training
from lora_diffusion.report.text_page import write_text_page


class TestNormaliser:
    def test_english_knows_numbers_and_the_spellings_of_the_base(self, tmp_path: Path) -> None:
        assert normaliser("en", None)("Twenty-one, COLOURS!") == "21 colours"
        (tmp_path / "normalizer.json").write_text(json.dumps({"colours": "colors"}))
        assert normaliser("en", tmp_path)("Twenty-one, COLOURS!") == "21 colors"

    def test_other_languages_lose_case_and_punctuation(self) -> None:
        assert normaliser("de", None)("Grün, sagte er.").split() == ["grün", "sagte", "er"]


def test_rates_are_edits_over_length_and_worst_come_first() -> None:
    said = ["go left now", "stop", "up"]
    found = judge(["a", "b", "c"], said, ["go right now", "stop", "up up up"], [str] * 3)
    assert [(one.key, pytest.approx(one.wer)) for one in found.recordings] == [("c", 2), ("a", 1 / 3), ("b", 0)]
    assert found.wer == pytest.approx(3 / 5)
    assert found.lines(most=1) == [
        "WER 60.0%, CER 58.8% over 3 recordings",
        "  200.0%  c: said 'up', heard 'up up up'",
        "  and 1 more with errors",
    ]


def test_page(tmp_path: Path) -> None:
    before = judge(["a", "b"], ["one <two>", "three"], ["none", "three"], [str, str])
    after = judge(["a", "b"], ["one <two>", "three"], ["one two", "three"], [str, str])
    page = whisper.SHOW.page({"new accent and words": (before, after)})
    training = Training(metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], facts={"adapter.rank": "8"})
    write_text_page(tmp_path / "report.html", page, training=training, next_commands=("do this",))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("one &lt;two&gt;", "one two", "0.667", "0.333", "adapter.rank", "do this", "<svg"):
        assert text in html
    assert "<two>" not in html
