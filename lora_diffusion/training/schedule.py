"""The course of the learning rate: a function of the step alone, so there is no state to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from lora_diffusion.core.errors import ConfigError

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda _: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Progress after the warmup, 0 to 1 -> share of the highest learning rate."""


def find(name: str) -> Callable[[float], float]:
    """Returns the schedule of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"train.schedule={name} is unknown; use one of {', '.join(SCHEDULES)}.")
    return SCHEDULES[name]


def factor(name: str, step: int, num_steps: int, warmup_steps: int = 0) -> float:
    """Share of the highest learning rate that a step takes.

    No step is wasted at 0: the first one of a warmup of n steps takes 1 / (n + 1), and the fall would reach 0 one step
    after the last.

    Args:
        name: constant, linear or cosine.
        step: 1 to num_steps.
        num_steps: length of the run.
        warmup_steps: steps of linear rise before the schedule begins.

    Raises:
        ConfigError: unknown name.
    """
    schedule = find(name)
    if step <= warmup_steps:
        return step / (warmup_steps + 1)
    return schedule((step - 1 - warmup_steps) / max(1, num_steps - warmup_steps))
