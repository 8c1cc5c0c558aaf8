"""The benchmark of memory on networks small enough for a test; its numbers mean something at full size only."""

from __future__ import annotations

import pytest

from scripts.benchmarks import memory, published_networks
from scripts.benchmarks.memory import Case

SMALL = {"norm_num_groups": 8, "attention_head_dim": 4}
UNETS = {
    "sd1": {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8},
    "sdxl": SMALL | {"block_out_channels": [32, 64, 64], "transformer_layers_per_block": [1, 1, 1]},
}
TEXT_ENCODER = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    unet_config, text_configs = published_networks.unet_config, published_networks.text_encoder_configs
    monkeypatch.setattr(published_networks, "unet_config", lambda name: unet_config(name) | UNETS[name])
    monkeypatch.setattr(
        published_networks,
        "text_encoder_configs",
        lambda name: {part: config | TEXT_ENCODER for part, config in text_configs(name).items()},
    )


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
    assert memory.measured(case, 64)["weights"] > 0


def test_the_estimate_knows_the_weights() -> None:
    plain, quantized = (memory.estimated(Case("sdxl", kind, trains_text=True), 64) for kind in ("none", "nf4"))
    assert plain["total"] == sum(value for name, value in plain.items() if name != "total")
    assert quantized["frozen weights"] < plain["frozen weights"]
    assert quantized["adapter"] == plain["adapter"]
