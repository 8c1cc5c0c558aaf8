import pytest

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.training.schedule import SCHEDULES, factor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_values(name: str, expected: list[float]) -> None:
    assert [factor(name, step, 4) for step in (1, 2, 3, 4)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_evenly_to_the_full_rate(name: str) -> None:
    rates = [factor(name, step, 10, warmup_steps=3) for step in range(1, 5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_is_wasted_at_zero(name: str) -> None:
    assert all(0 < factor(name, step, 7, 2) <= 1 for step in range(1, 8))


def test_a_warmup_as_long_as_the_run_is_allowed() -> None:
    assert factor("cosine", 3, 3, warmup_steps=3) == 0.75


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"train.schedule=cosin .*constant, linear, cosine"):
        factor("cosin", 1, 2)
