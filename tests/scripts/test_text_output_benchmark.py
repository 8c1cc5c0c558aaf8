"""The check of Whisper and LLaVA on networks small enough for a test; its memory means something at full size only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from scripts.benchmarks import published_networks, text_output
from scripts.benchmarks.text_output import Case

WHISPER = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small, sizes = partial(published_networks.whisper_config, **WHISPER, **LAYERS), published_networks.LLAVA_1B
    monkeypatch.setattr(published_networks, "whisper_config", small)
    monkeypatch.setitem(sizes, "text_config", sizes["text_config"] | TEXT)
    monkeypatch.setitem(sizes, "vision_config", sizes["vision_config"] | VISION)
    monkeypatch.setattr(text_output, "NUM_STEPS", 3)


@pytest.mark.parametrize("case", [Case("whisper", "8bit"), Case("llava", "nf4")], ids=lambda case: case.family)
def test_a_base_is_trained_and_its_adapter_loads_in_plain_transformers(case: Case, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    text_output.build_base(case.family, base)
    found = text_output.measured(case, base, run)
    assert found["estimated"] == sum(found["parts"].values())
    assert text_output.difference(case, base, run, found["adapter"]) < text_output.LARGEST_DIFFERENCE
