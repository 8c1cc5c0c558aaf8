from __future__ import annotations

import pytest

from scripts.benchmarks import scoring


def test_both_arms_find_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    result = scoring.compare(num=70, repeats=1)
    assert result["score difference"] < 1e-4
    assert result["arms"].keys() == {"ours", "torchmetrics"}
    cpu = {name: values["cpu_s"] for name, values in result["arms"].items()}
    assert result["torchmetrics / ours"]["cpu_s"] == pytest.approx(cpu["torchmetrics"] / cpu["ours"])
    evaluation = {"images": 8, "generating": 9.0, "all else": 0.1, "total": 10.0, "share outside": 0.01}
    scoring.print_report(result | {"evaluation": evaluation})
    assert "share outside 0.01" in capsys.readouterr().out
