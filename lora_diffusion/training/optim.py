"""The optimizer, and the learning rate of each part and module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ConfigError, UnsupportedError
from lora_diffusion.core.extras import require

Params = Mapping[str, Mapping[str, nn.Parameter]]
"""Part -> name of the parameter in the part -> the trainable parameter, float32."""


_SMALLEST_8BIT = 4096
"""Parameters with fewer numbers keep their moments in 32 bits, as bitsandbytes has it."""
_BLOCK_8BIT = 256
_Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class _Optimizer:
    """One value of `train.optimizer`."""

    build: Callable[[_Groups, TrainConfig], torch.optim.Optimizer]
    devices: frozenset[str] | None = None
    """Types of device that it runs on; None means all."""
    is_8bit: bool = False


def _adamw(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # One fused kernel is the fastest form; torch has it for these devices.
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=devices <= {"cpu", "cuda"})


def _adamw8bit(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    bnb: Any = require("bitsandbytes", "train.optimizer=adamw8bit")
    optimizer: torch.optim.Optimizer = bnb.optim.AdamW8bit(groups, weight_decay=config.weight_decay)
    return optimizer


def _paged_adamw8bit(groups: _Groups, config: TrainConfig) -> torch.optim.Optimizer:
    bnb: Any = require("bitsandbytes", "train.optimizer=paged_adamw8bit")
    optimizer: torch.optim.Optimizer = bnb.optim.PagedAdamW8bit(groups, weight_decay=config.weight_decay)
    return optimizer


OPTIMIZERS: Mapping[str, _Optimizer] = {
    "adamw": _Optimizer(_adamw),
    "adamw8bit": _Optimizer(_adamw8bit, frozenset({"cpu", "cuda", "xpu"}), is_8bit=True),
    "paged_adamw8bit": _Optimizer(_paged_adamw8bit, frozenset({"cuda", "xpu"}), is_8bit=True),
}
"""`train.optimizer` -> how it is built (Dettmers et al. 2021, arXiv 2110.02861, for 8 bits)."""


def check(config: TrainConfig, device: torch.device) -> None:
    """Checks that the optimizer can run; call it before anything is loaded.

    Raises:
        ConfigError: there is no such optimizer.
        UnsupportedError: bitsandbytes is missing, or cannot run it on the device.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ConfigError(f"train.optimizer={config.optimizer} is unknown; use one of {', '.join(OPTIMIZERS)}.")
    chosen = OPTIMIZERS[config.optimizer]
    if chosen.is_8bit:
        require("bitsandbytes", f"train.optimizer={config.optimizer}")
    if chosen.devices is not None and device.type not in chosen.devices:
        able = [name for name, other in OPTIMIZERS.items() if other.devices is None or device.type in other.devices]
        raise UnsupportedError(
            f"train.optimizer={config.optimizer} cannot run on the device {device.type}: bitsandbytes has it for "
            f"{', '.join(sorted(chosen.devices))}; use {' or '.join(able)}."
        )


def state_bytes(name: str, num_parameters: int) -> int:
    """Returns what an optimizer keeps for one parameter tensor.

    Args:
        name: value of `train.optimizer`.
        num_parameters: numbers in the tensor.
    """
    if OPTIMIZERS[name].is_8bit and num_parameters >= _SMALLEST_8BIT:
        return 2 * (num_parameters + 4 * -(-num_parameters // _BLOCK_8BIT))
    return 2 * 4 * num_parameters


def named(params: Params) -> Iterable[tuple[str, nn.Parameter]]:
    """Yields ("part/name", parameter) in the order of checkpoints."""
    for part, parameters in params.items():
        for name, parameter in parameters.items():
            yield f"{part}/{name}", parameter


def learning_rate(config: TrainConfig, part: str) -> float:
    """Returns the highest learning rate of a part; text encoders take a tenth unless the config says otherwise."""
    named = dict(text.split("=") for text in config.part_learning_rates)
    if part in named:
        return float(named[part])
    if not part.startswith("text_encoder"):
        return config.learning_rate
    rate = config.text_encoder_learning_rate
    return config.learning_rate / 10 if rate is None else rate


def build(
    config: TrainConfig, params: Params, module_rates: Mapping[ModuleKey, float] = MappingProxyType({})
) -> torch.optim.Optimizer:
    """Builds the optimizer, with one group for each highest learning rate in a part, which is `group["initial_lr"]`.

    Args:
        config: gives the rates of parts.
        params: what is trained.
        module_rates: of the modules that have their own; parameters are named "<module path>.<tensor name>".

    Raises:
        ConfigError: unknown optimizer, or nothing to train.
        UnsupportedError: the optimizer cannot run here.
    """
    groups: _Groups = [
        {"params": group, "lr": rate, "initial_lr": rate, "part": part}
        for part, parameters in params.items()
        for rate, group in _by_rate(part, parameters, learning_rate(config, part), module_rates).items()
        if group
    ]
    if not groups:
        raise ConfigError("There is nothing to train: adapter.parts and adapter.targets select no parameter.")
    check(config, groups[0]["params"][0].device)
    return OPTIMIZERS[config.optimizer].build(groups, config)


def _by_rate(
    part: str, parameters: Mapping[str, nn.Parameter], usual: float, module_rates: Mapping[ModuleKey, float]
) -> dict[float, list[nn.Parameter]]:
    # The usual rate comes first, since the rate of the first group is the one that the log shows.
    groups: dict[float, list[nn.Parameter]] = {usual: []}
    for name, parameter in parameters.items():
        rate = module_rates.get(ModuleKey(part, name.rpartition(".")[0]), usual)
        groups.setdefault(rate, []).append(parameter)
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets each group to its highest rate times `factor` and returns the rate of the first one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def read_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Returns what the optimizer keeps for a parameter, moments of its shape and counts; no tables."""
    kept = optimizer.state.get(parameter, {})
    return {name: torch.as_tensor(value) for name, value in kept.items() if not name.startswith("qmap")}


def load_state(optimizer: torch.optim.Optimizer, states: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Gives an optimizer what `read_state` read, bit for bit.

    Args:
        optimizer: without state.
        states: one for each parameter, moments of its shape and counts; empty where nothing was kept.
    """
    if not hasattr(optimizer, "init_state"):
        ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbered = {index: dict(states[parameter]) for index, parameter in enumerate(ordered) if states[parameter]}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": numbered})
        return
    # bitsandbytes: its own buffers may be paged, and its load_state_dict makes others.
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            saved = states[parameter]
            if saved:
                optimizer.init_state(group, parameter, group_index, index)
            state = optimizer.state[parameter] if saved else {}
            for name, value in saved.items():
                state[name] = int(value) if name == "step" else state[name].copy_(value)
