"""Puts adapters into a loaded base."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_diffusion.adapters._fused import FusedLinear, TrainingDropout
from lora_diffusion.adapters.plan import InjectionPlan
from lora_diffusion.adapters.switch import switch_of
from lora_diffusion.adapters.variants import Variant
from lora_diffusion.core import rng
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.core.types import Loaded, ModuleKey


class Size(NamedTuple):
    """How large an adapter a module gets."""

    rank: int
    alpha: float


Fill = Callable[[ModuleKey, str, torch.Size], Tensor]
"""(module, tensor name, shape) -> CPU values of a new adapter tensor."""


def inject(
    loaded: Loaded, plan: InjectionPlan, variant: Variant, dropout: float, seed: int, name: str = "default"
) -> dict[str, dict[str, nn.Parameter]]:
    """Adds a new, trainable adapter with weight 1 that changes nothing yet.

    Args:
        loaded: its networks are changed in place and `loaded.adapters` is set.
        plan: made from the same base.
        variant: kind of adapter.
        dropout: acts wherever a gradient is recorded, whether the network is in training mode or not.
        seed: decides the first values; those of a module depend on the seed and its name only.
        name: adapter name.

    Returns:
        part -> "<module path>.<tensor name>" -> parameter, float32 on the base's device. Nothing else of the parts
        requires a gradient.

    Raises:
        RunError: a planned module did not get its layer.
        ConfigError: the name is taken.
    """
    sizes = {module.key: Size(module.rank, module.alpha) for module in plan.modules}
    add_adapter(loaded, sizes, variant, name, _first_values(seed), dropout=dropout)
    for part in plan.part_sizes:
        loaded.parts[part].requires_grad_(False)
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in plan.part_sizes}
    for key in sizes:
        layer = _layer(loaded, key)
        for tensor, attribute in variant.tensors.items():
            parameter = getattr(layer, attribute)[name].weight.requires_grad_(True)
            parameters[key.part][f"{key.path}.{tensor}"] = parameter
    return parameters


def add_adapter(
    loaded: Loaded,
    sizes: Mapping[ModuleKey, Size],
    variant: Variant,
    name: str,
    fill: Fill,
    *,
    dropout: float = 0.0,
    weight: float = 1.0,
) -> None:
    """Adds a frozen adapter and gives its tensors the values of `fill`; other adapters stay as they are."""
    switch = switch_of(loaded)
    if name in switch.weights:
        raise ConfigError(f'Two adapters are called "{name}"; give each its own name.')
    for part in dict.fromkeys(key.part for key in sizes):
        own = {key.path: size for key, size in sizes.items() if key.part == part}
        _install(loaded.parts[part], own, name, dropout)
    for key, size in sizes.items():
        layer = _layer(loaded, key)
        _check(layer, key, size, name)
        for tensor, attribute in variant.tensors.items():
            holder = getattr(layer, attribute)[name]
            device = layer.get_base_layer().weight.device
            values = fill(key, tensor, holder.weight.shape).to(device, torch.float32)
            holder.weight = nn.Parameter(values, requires_grad=False)
    switch.variants[name] = variant
    switch.weights[name] = 0.0
    switch.set_weights({**switch.weights, name: weight})


def _install(network: nn.Module, sizes: Mapping[str, Size], name: str, dropout: float) -> None:
    """Lets PEFT wrap the modules; the new tensors are on the meta device, so no random number is drawn."""
    rank = Counter(size.rank for size in sizes.values()).most_common(1)[0][0]
    alpha = Counter(size.alpha for size in sizes.values()).most_common(1)[0][0]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int, used as a factor
        lora_dropout=dropout,
        target_modules=_either(sizes),
        rank_pattern=_pattern({path: size.rank for path, size in sizes.items() if size.rank != rank}),
        alpha_pattern=_pattern({path: size.alpha for path, size in sizes.items() if size.alpha != alpha}),
    )
    if all(type(_base(network, path)) in (nn.Linear, nn.Conv2d) for path in sizes):
        config._register_custom_module({nn.Linear: FusedLinear})
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    inject_adapter_in_model(config, network, adapter_name=name, low_cpu_mem_usage=True)
    # Left there, it makes PEFT warn at the next adapter and diffusers write it into saved models.
    del network.peft_config
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for path in sizes:
        layer: Any = network.get_submodule(path)
        layer.train(network.training)
        if dropout:
            layer.lora_dropout[name] = TrainingDropout(dropout)


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    # One expression for all modules of a value: PEFT tries every entry on every module.
    return {
        f"^{_either(path for path, own in values.items() if own == value)}": value for value in set(values.values())
    }


def _either(paths: Iterable[str]) -> str:
    return f"(?:{'|'.join(re.escape(path) for path in paths)})"


def _base(network: nn.Module, path: str) -> Any:
    module = network.get_submodule(path)
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _layer(loaded: Loaded, key: ModuleKey) -> Any:
    return loaded.parts[key.part].get_submodule(key.path)


def _check(layer: Any, key: ModuleKey, size: Size, name: str) -> None:
    if not isinstance(layer, LoraLayer) or name not in layer.r:
        raise RunError(
            f"PEFT left {key.part}/{key.path} ({type(layer).__name__}) without an adapter. Please report this with "
            "the versions of peft, diffusers and transformers."
        )
    base = type(layer.get_base_layer())
    if base not in (nn.Linear, nn.Conv2d) and type(layer).__name__ != base.__name__:
        raise RunError(
            f"PEFT gave {key.part}/{key.path}, which is a {base.__name__}, the layer for unquantized weights. The base "
            "must be loaded with its quantization flags set; set model.quantization=none to go on without."
        )
    if (layer.r[name], layer.lora_alpha[name]) != size:
        raise RunError(f"PEFT gave {key.part}/{key.path} another size than {size}; please report this.")


def _first_values(seed: int) -> Fill:
    def fill(key: ModuleKey, tensor: str, shape: torch.Size) -> Tensor:
        values = torch.zeros(shape)
        if tensor == "down":
            nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=rng.derive(seed, "adapter", key.part, key.path))
        return values

    return fill
