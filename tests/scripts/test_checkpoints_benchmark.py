"""What is told of merge and extract is what they cost and how far they are off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.benchmarks import checkpoints

_STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"


def _adapter(path: Path, up: dict[str, float]) -> Path:
    tensors = {}
    for name, value in up.items():
        tensors[f"{_STEM}{name}.lora_down.weight"] = torch.full((1, 768), 0.01)
        tensors[f"{_STEM}{name}.lora_up.weight"] = torch.full((320, 1), value)
        tensors[f"{_STEM}{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def test_error_of_a_layer_is_relative_and_1_where_it_is_missing(tmp_path: Path) -> None:
    wanted = _adapter(tmp_path / "a.safetensors", {"k": 0.5, "v": 0.5})
    found = _adapter(tmp_path / "b.safetensors", {"k": 0.4})
    assert checkpoints.layer_errors(wanted, wanted) == pytest.approx([0, 0], abs=1e-6)
    assert sorted(checkpoints.layer_errors(wanted, found)) == pytest.approx([0.2, 1.0])


def test_the_report_compares_with_the_largest_file(capsys: pytest.CaptureFixture[str]) -> None:
    cost = {"wall_s": 3.0, "cpu_s": 2.0, "peak_bytes": 5 * 10**8}
    one = {"bytes": 2 * 10**9, "largest_file_bytes": 10**9, "merge": cost}
    both = {**one, "extract": cost, "median_error": 1e-3, "largest_error": 2e-3}
    checkpoints.print_report({"sd1": both, "sdxl": {**one, "merge": {**cost, "peak_bytes": 12 * 10**8}}})
    lines = capsys.readouterr().out.splitlines()
    assert "| sd1, 2.0 | extract | 3 | 2 | 0.50 | 0.50 | 1.0e-03 | 2.0e-03 |" in lines
    assert len([line for line in lines if "extract" in line]) == 1
    assert lines[-1] == "largest peak of merge / largest file: 1.20   less than 1.5"
