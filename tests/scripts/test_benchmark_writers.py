"""The check of Whisper and LLaVA on networks small enough for a test; its memory means something at full size only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from scripts import benchmark_writers, full_size
from scripts.benchmark_writers import Case

WHISPER = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small, sizes = partial(full_size.whisper_config, **WHISPER, **LAYERS), full_size.LLAVA_1B
    monkeypatch.setattr(full_size, "whisper_config", small)
    monkeypatch.setitem(sizes, "text_config", sizes["text_config"] | TEXT)
    monkeypatch.setitem(sizes, "vision_config", sizes["vision_config"] | VISION)
    monkeypatch.setattr(benchmark_writers, "NUM_STEPS", 3)


@pytest.mark.parametrize("case", [Case("whisper", "8bit"), Case("llava", "nf4")], ids=lambda case: case.family)
def test_a_base_is_trained_and_its_adapter_loads_in_plain_transformers(case: Case, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    benchmark_writers.build_base(case.family, base)
    found = benchmark_writers.measured(case, base, run)
    assert found["estimated"] == sum(found["parts"].values())
    assert benchmark_writers.difference(case, base, run, found["adapter"]) < benchmark_writers.LARGEST_DIFFERENCE
