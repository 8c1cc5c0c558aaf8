"""What is timed is right: both ways give the same adapter, and the modules are those of SDXL."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from scripts.benchmarks import adapter_files
from scripts.benchmarks.adapter_files import JOBS


@pytest.mark.parametrize("name", JOBS)
def test_both_ways_give_the_same(name: str) -> None:
    job = JOBS[name]
    terms = adapter_files.random_factors((96, 80), job, seed=0)
    (own_down, own_up), (down, up) = (way(terms, job.rank) for way in (adapter_files.ours, adapter_files.dense))
    assert torch.allclose(own_up @ own_down, up @ down, atol=1e-5 * float((up @ down).norm()))
    assert own_down.shape == down.shape


def test_costs_are_scaled_by_counts() -> None:
    result = adapter_files.measure(JOBS["merge of 2, exact"], [(96, 80)] * 3 + [(80, 96)], every=False)
    assert result["ratio"] == pytest.approx(result["dense_s"] / result["ours_s"])
    assert result["ours_error"] < 1e-6
    assert result["excess"] <= 0


def test_modules_are_those_that_kohya_trains() -> None:
    shapes = adapter_files.module_shapes()
    assert Counter(key.part for key in shapes) == {"unet": 722, "text_encoder": 72}
