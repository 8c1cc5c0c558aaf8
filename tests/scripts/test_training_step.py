import pytest

from scripts.benchmarks import training_step
from scripts.benchmarks.processes import Cost
from scripts.benchmarks.training_step import Setting


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
# Compiling takes minutes.
@pytest.mark.parametrize("arm", [name for name in training_step.ARMS if name != "compiled"])
def test_each_arm_makes_steps(arm: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"sample_size": 8, "block_out_channels": (16, 32, 32), "norm_num_groups": 8, "attention_head_dim": 2}
    monkeypatch.setitem(training_step.SIZES, "tiny", training_step.SIZES["small"] | changes)
    step = training_step.ARMS[arm](Setting("tiny", dtype, 2, "1"))
    step(1)
    step(2)


def test_the_report_compares_medians() -> None:
    costs = {
        "ours": [Cost(2.0, 1.0, 200), Cost(1.0, 1.0, 300), Cost(9.0, 1.0, 300)],
        "plain": [Cost(4.0, 2.0, 400), Cost(4.0, 2.0, 400), Cost(1.0, 2.0, 400)],
        "floor": [Cost(2.0, 1.0, 200)] * 3,
    }
    result = training_step.report(Setting("small", "fp32", 1, "1"), costs)
    assert result["ratios"]["ours / plain"] == {"wall_s": 0.5, "cpu_s": 0.5, "peak_bytes": 0.75}
    assert result["ratios"]["ours / floor"] == {"wall_s": 1.0, "cpu_s": 1.0, "peak_bytes": 1.5}
