"""The benchmark of memory on networks small enough for a test; its numbers mean something at full size only."""

from __future__ import annotations

import pytest

from scripts import benchmark_memory, full_size
from scripts.benchmark_memory import Case

SMALL = {"block_out_channels": [32, 64, 64], "norm_num_groups": 8, "attention_head_dim": 4}
TOWER = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = full_size.UNETS["sd1"], full_size.UNETS["sdxl"] | {"transformer_layers_per_block": [1, 1, 1]}
    channels = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8}
    unets = {"sd1": first | channels, "sdxl": second | SMALL}
    towers = {
        family: {name: (kind, sizes | TOWER) for name, (kind, sizes) in full_size.TOWERS[family].items()}
        for family in unets
    }
    monkeypatch.setattr(full_size, "UNETS", unets)
    monkeypatch.setattr(full_size, "TOWERS", towers)


@pytest.mark.parametrize(
    "case",
    [
        Case("sd1", "nf4", gradient_checkpointing=True),
        Case("sdxl", "8bit", trains_text=True),
        Case("sd1", is_full=True),
    ],
    ids=["sd1", "sdxl", "full"],
)
def test_each_kind_of_case_makes_steps(case: Case) -> None:
    assert benchmark_memory.measured(case, 64)["weights"] > 0


def test_the_estimate_knows_the_weights() -> None:
    plain, quantized = (
        benchmark_memory.estimated(Case("sdxl", kind, trains_text=True), 64) for kind in ("none", "nf4")
    )
    assert plain["total"] == sum(value for name, value in plain.items() if name != "total")
    assert quantized["frozen weights"] < plain["frozen weights"]
    assert quantized["adapter"] == plain["adapter"]
