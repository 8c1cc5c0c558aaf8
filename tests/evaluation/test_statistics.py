from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from lora_diffusion.evaluation.statistics import Interval, interval, nested_interval


def test_of_one_seed_it_is_the_percentile_bootstrap() -> None:
    values = np.random.default_rng(3).normal(size=(60, 1))
    own = interval(values)
    theirs = bootstrap((values[:, 0],), np.mean, method="percentile", n_resamples=5000, rng=0).confidence_interval
    # The ends of two samples of resampled means differ by some percent of the width.
    width = theirs.high - theirs.low
    assert own.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert own.high == pytest.approx(theirs.high, abs=0.06 * width)
    assert own.mean == pytest.approx(values.mean())


def test_seeds_of_one_prompt_are_no_new_prompts() -> None:
    """Where prompts differ and seeds do not, ten seeds tell no more than one."""
    prompts = np.random.default_rng(0).normal(size=(20, 1))
    one, ten = interval(prompts), interval(prompts.repeat(10, axis=1))
    assert ten.high - ten.low == pytest.approx(one.high - one.low, rel=0.1)


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        values = rng.normal(size=(25, 1)) + rng.normal(size=(25, 4))
        found = nested_interval(values)
        hits += found.low <= 0 <= found.high
    assert 0.88 <= hits / 300 <= 0.98


def test_a_seed_is_the_same_noise_for_all_prompts() -> None:
    """Where seeds differ and prompts do not, 50 prompts tell no more than one, however many values there are."""
    rng = np.random.default_rng(1)
    hits = nested_hits = 0
    for _ in range(100):
        values = rng.normal(size=(1, 12)) + 0.1 * rng.normal(size=(50, 12))
        hits += interval(values).covers_zero
        nested_hits += nested_interval(values).covers_zero
    # The percentile bootstrap of 12 values is a little too narrow.
    assert 0.85 <= hits / 100 <= 0.99
    assert nested_hits / 100 < 0.5


def test_of_noise_alone_it_is_wide_but_not_by_much() -> None:
    """Owen 2007, theorem 3: up to three times the variance, where neither prompts nor seeds matter."""
    values = np.random.default_rng(5).normal(size=(40, 30))
    crossed, nested = interval(values), nested_interval(values)
    assert 1 < (crossed.high - crossed.low) / (nested.high - nested.low) < 3**0.5


def test_one_value_tells_nothing_of_how_sure_it_is() -> None:
    for one in (interval(np.array([[0.3]])), nested_interval(np.array([[0.3]]))):
        assert one == Interval(0.3, -float("inf"), float("inf"))
        assert one.covers_zero
        assert not one.has_bounds
        assert one.num_needed(1) == float("inf")


def test_without_a_value_nothing_can_be_told() -> None:
    nan = float("nan")
    assert Interval(nan, nan, nan).covers_zero
    assert not Interval(nan, nan, nan).has_bounds


def test_it_is_always_the_same_and_moves_with_the_values() -> None:
    values = np.random.default_rng(2).normal(size=(5, 2))
    assert interval(values) == interval(values.copy())
    assert interval(values + 1).low == pytest.approx(interval(values).low + 1)
    still = interval(np.ones((4, 2)))
    assert (still.mean, still.low, still.high) == pytest.approx((1, 1, 1))


def test_number_needed_grows_with_the_square() -> None:
    unsure = Interval(0.1, -0.1, 0.3)
    assert unsure.covers_zero
    assert unsure.num_needed(10) == pytest.approx(40)
    assert Interval(0.0, -1, 1).num_needed(10) == float("inf")
    assert not Interval(0.2, 0.1, 0.3).covers_zero
