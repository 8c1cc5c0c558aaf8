"""Adapters as shapes, for what a step needs of memory.

LoRA on plain layers does without PEFT, which takes seconds to import.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_diffusion.adapters.lora_arithmetic import FusedProduct, TrainingDropout
from lora_diffusion.adapters.plan import InjectionPlan, PlannedModule
from lora_diffusion.adapters.variants import Variant
from lora_diffusion.core.base_model import Loaded

_PLAIN = (nn.Linear, nn.Conv2d)


def inject_shapes(
    loaded: Loaded, plan: InjectionPlan, variant: Variant, dropout: float
) -> dict[str, dict[str, nn.Parameter]]:
    """Adds what makes the tensors of a step that the adapter of `inject` makes, and can do nothing else.

    Args:
        loaded: its networks are on the meta device and are changed in place.
        plan: made from the same base and variant.
        variant: of the adapter.
        dropout: of the adapter.

    Returns:
        As `inject` does.
    """
    if variant.stored != "lora" or any(not _is_plain(loaded, module) for module in plan.modules):
        from lora_diffusion.adapters.inject import inject

        return inject(loaded, plan, variant, dropout, seed=0)
    parameters: dict[str, dict[str, nn.Parameter]] = {part: {} for part in plan.part_sizes}
    for part in plan.part_sizes:
        loaded.parts[part].requires_grad_(False)
    for module in plan.modules:
        network = loaded.parts[module.part]
        layer = _Lora(network.get_submodule(module.path), module, dropout)
        network.set_submodule(module.path, layer)
        factors = {name: layer.get_parameter(f"{name}.weight") for name in ("down", "up")}
        parameters[module.part] |= {f"{module.path}.{name}": weight for name, weight in factors.items()}
    return parameters


def _is_plain(loaded: Loaded, module: PlannedModule) -> bool:
    return not module.identity and type(loaded.parts[module.part].get_submodule(module.path)) in _PLAIN


class _Lora(nn.Module):
    """A layer with the factors of LoRA beside it, which makes the tensors that the layer of PEFT makes."""

    def __init__(self, base: nn.Module, module: PlannedModule, dropout: float) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = _factors(base, module.rank)
        self.scale = module.alpha / module.rank
        self.dropout = TrainingDropout(dropout) if dropout else nn.Identity()
        self.is_fused = isinstance(base, nn.Linear) and not dropout

    def forward(self, x: Tensor) -> Tensor:
        base, dtype = self.base_layer, self.get_parameter("down.weight").dtype
        is_cast = torch.is_autocast_enabled(x.device.type)
        if self.is_fused and x.dim() > 1 and (is_cast or x.dtype == dtype):
            target = torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype
            factors = (self.down.weight, self.up.weight)
            return FusedProduct.apply(x, base.weight, base.bias, *factors, self.scale, target)  # type: ignore[no-any-return]
        answer = base(x)
        return (answer + self.up(self.down(self.dropout(x.to(dtype)))) * self.scale).to(answer.dtype)  # type: ignore[no-any-return]


def _factors(base: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        if isinstance(base, nn.Conv2d):
            down = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)  # type: ignore[arg-type]
            return down, nn.Conv2d(rank, base.out_channels, 1, groups=base.groups, bias=False)
        assert isinstance(base, nn.Linear)
        return nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
