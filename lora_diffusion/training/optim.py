"""The optimizer, and the learning rate of each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.core.errors import ConfigError

Params = Mapping[str, Mapping[str, nn.Parameter]]
"""Part -> name of the parameter in the part -> the trainable parameter, float32."""


def _adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    # One fused kernel is the fastest form; torch has it for these devices.
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=kinds <= {"cpu", "cuda"})


OPTIMIZERS: Mapping[str, Callable[[list[dict[str, Any]], TrainConfig], torch.optim.Optimizer]] = {"adamw": _adamw}
"""`train.optimizer` -> builder."""


def named(params: Params) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields ("part/name", parameter) in the order of the optimizer's parameters."""
    for part, own in params.items():
        for name, parameter in own.items():
            yield f"{part}/{name}", parameter


def learning_rate(config: TrainConfig, part: str) -> float:
    """Returns the highest learning rate of a part; text encoders take a tenth unless the config says otherwise."""
    if not part.startswith("text_encoder"):
        return config.learning_rate
    own = config.text_encoder_learning_rate
    return config.learning_rate / 10 if own is None else own


def build(config: TrainConfig, params: Params) -> torch.optim.Optimizer:
    """Builds the optimizer, with one group for each part whose highest learning rate is `group["initial_lr"]`.

    Raises:
        ConfigError: unknown optimizer, or nothing to train.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ConfigError(f"train.optimizer={config.optimizer} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    rates = {part: learning_rate(config, part) for part in params}
    groups = [
        {"params": list(own.values()), "lr": rates[part], "initial_lr": rates[part], "part": part}
        for part, own in params.items()
        if own
    ]
    if not groups:
        raise ConfigError("There is nothing to train: adapter.parts and adapter.targets select no parameter.")
    return OPTIMIZERS[config.optimizer](groups, config)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group to its highest rate times `factor` and returns the rate of the first one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
