"""Which modules get an adapter, worked out before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.targets import MAX_LISTED, Scope, fit_for_adapters, layer_type, read_ones, settle
from lora_diffusion.adapters.variants import Variant
from lora_diffusion.config.per_module import Entry
from lora_diffusion.config.schema import AdapterConfig
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import Part
from lora_diffusion.core.errors import ConfigError, TargetError
from lora_diffusion.core.text import name_some, suggestion

if TYPE_CHECKING:
    from torch import Tensor, nn

_NOTHING: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True)
class PlannedModule:
    """One module that gets an adapter."""

    part: str
    path: str
    layer_type: str
    """linear or conv."""
    shape: tuple[int, ...]
    """Of the frozen weight: (out, in) or (out, in, k, k)."""
    rank: int
    alpha: float
    """The change is scaled by alpha / rank, also for rslora."""
    tensors: Mapping[str, tuple[int, ...]] = field(hash=False)
    """Name -> shape of the adapter's tensors; all of them are trained but `identity`."""
    num_parameters: int
    """Those that are trained."""
    identity: str = ""
    """Tensor that is the identity and stays so, since the weight is trained in full; "" where there is none."""
    learning_rate: float | None = None
    """The highest, where it is the module's own and not that of its part."""

    @property
    def key(self) -> ModuleKey:
        """Returns the module's name."""
        return ModuleKey(self.part, self.path)

    @property
    def is_scaled(self) -> bool:
        """Says whether alpha changes anything, which two whole factors of lokr leave out."""
        return not {"w1", "w2"} <= self.tensors.keys()

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for plan.json, where the layer type is called kind."""
        return {"kind" if name == "layer_type" else name: value for name, value in asdict(self).items()}

    def fixed(self) -> dict[str, Tensor]:
        """Returns the tensors that are not trained: the identity, [rank, in] or [out, rank], or none."""
        import torch

        if not self.identity:
            return {}
        return {self.identity: torch.eye(self.rank).reshape(self.tensors[self.identity])}


@dataclass(frozen=True)
class InjectionPlan:
    """All modules that get an adapter; printed before training and kept as plan.json."""

    modules: tuple[PlannedModule, ...]
    part_sizes: Mapping[str, int]
    """Part -> number of parameters of the frozen network."""
    unread: tuple[str, ...] = ()
    """Part/path of modules that were asked for and left out, since the base never reads what they give."""

    @property
    def num_parameters(self) -> int:
        """Returns how many numbers are trained."""
        return sum(module.num_parameters for module in self.modules)

    def of_part(self, part: str) -> tuple[PlannedModule, ...]:
        """Returns the modules of one part."""
        return tuple(module for module in self.modules if module.part == part)

    def module_rates(self) -> dict[ModuleKey, float]:
        """Returns the highest learning rates of the modules that have their own."""
        return {module.key: module.learning_rate for module in self.modules if module.learning_rate}

    def lines(self) -> list[str]:
        """Returns one line for each part: modules, parameters, their share of the network; and what is left out."""
        lines = [self._summary(part, size) for part, size in self.part_sizes.items()]
        if self.unread:
            names = name_some(list(self.unread))
            lines.append(f"left out: {len(self.unread)} modules whose output this base never reads ({names})")
        return lines

    def _summary(self, part: str, size: int) -> str:
        modules = self.of_part(part)
        count = sum(module.num_parameters for module in modules)
        return f"{part}: {len(modules)} modules, {count:,} trained parameters ({100 * count / size:.2f} % of {size:,})"

    def module_lines(self) -> list[str]:
        """Returns one line for each module."""
        return [
            f"{module.part}/{module.path}  {module.layer_type} {'x'.join(str(side) for side in module.shape)}  "
            f"rank {module.rank}  alpha {module.alpha:g}  {module.num_parameters:,} parameters"
            + (f"  learning rate {module.learning_rate:g}" if module.learning_rate else "")
            for module in self.modules
        ]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for plan.json."""
        modules = [module.to_json() for module in self.modules]
        return {"part_sizes": dict(self.part_sizes), "modules": modules, "unread": list(self.unread)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InjectionPlan:
        """Returns the plan that `to_json` gave."""
        modules = tuple(_restored(module) for module in values["modules"])
        return cls(modules, dict(values["part_sizes"]), tuple(values.get("unread", ())))


def _restored(values: Mapping[str, Any]) -> PlannedModule:
    tensors = {name: tuple(shape) for name, shape in values["tensors"].items()}
    settings = {"layer_type" if name == "kind" else name: value for name, value in values.items()}
    return PlannedModule(**{**settings, "shape": tuple(values["shape"]), "tensors": tensors})


def plan(
    meta_modules: Mapping[str, nn.Module],
    declared: Mapping[str, Part],
    config: AdapterConfig,
    learning_rates: Sequence[str] = (),
    unread: Mapping[str, Sequence[str]] = _NOTHING,
) -> InjectionPlan:
    """Resolves `adapter.parts`, `adapter.targets` and `adapter.full` to modules, each with its rank and alpha.

    Alpha and rank of a module are those that adapter.module_ranks and module_alphas give it, else those for
    convolutions if it is a wide one, else adapter.rank and alpha. A rank without an alpha from the same place keeps
    the scale.

    Args:
        meta_modules: part -> network on any device; the meta device is enough.
        declared: part -> its groups, from the family.
        config: asks for variant, parts, targets and size.
        learning_rates: `train.module_learning_rates`.
        unread: `BaseInfo.unread`; such modules are left out.

    Raises:
        TargetError: a target that matches nothing, nothing that the base reads, or what cannot hold an adapter, or a
            part left without a module; a setting of single modules that acts on none.
        ConfigError: a part that the base does not have; rank, alpha or dropout out of range, or of no use.
        UnsupportedError: there is no such variant.
    """
    variant = variants.find(config.variant)
    _check_numbers(config, variant)
    _check_parts(config.parts, meta_modules, declared)
    _check_full(config, variant)
    matched = _find(meta_modules, declared, config, variant, unread)
    read = {part: read_ones(modules, unread.get(part, ())) for part, modules in matched.items()}
    left_out = tuple(
        f"{part}/{path}" for part, modules in matched.items() for path in modules if path not in read[part]
    )
    empty = [part for part, modules in read.items() if not modules]
    if empty:
        raise TargetError(
            f"adapter.parts asks for {', '.join(empty)}, but adapter.targets={_listed(config.targets)} match no module "
            f"there. Groups of {empty[0]}: {', '.join(declared[empty[0]].groups)}. Add a target or drop the part."
        )
    single = _module_settings(read, declared, config, learning_rates)
    planned = tuple(
        replace(_planned(key, module, config, variant, single), learning_rate=single.learning_rate(key))
        for part, modules in read.items()
        for key, module in ((ModuleKey(part, path), module) for path, module in modules.items())
    )
    _check_ranks(planned, config, variant, single)
    _check_alphas(planned, single)
    _check_convolutions(planned, config, single)
    return InjectionPlan(planned, {part: _count(meta_modules[part]) for part in config.parts}, left_out)


def _find(
    meta_modules: Mapping[str, nn.Module],
    declared: Mapping[str, Part],
    config: AdapterConfig,
    variant: Variant,
    unread: Mapping[str, Sequence[str]],
) -> dict[str, dict[str, nn.Module]]:
    """Returns part -> path -> module of all that gets an adapter, in the order of the networks."""
    networks = {
        part: {path: module for path, module in meta_modules[part].named_modules() if path} for part in config.parts
    }
    by_targets = {part: modules for part, modules in networks.items() if part not in config.full}
    scope = Scope("adapter.targets", by_targets, declared, config.full)
    added = [
        f"{part}/{group}" for group in variant.added_targets for part in by_targets if group in declared[part].groups
    ]
    requested = {
        key for target in (*config.targets, *added) if by_targets for key in fit_for_adapters(scope, target, unread)
    }
    return {
        part: {
            path: module
            for path, module in modules.items()
            if (layer_type(module) if part in config.full else ModuleKey(part, path) in requested)
        }
        for part, modules in networks.items()
    }


class _ModuleSettings(NamedTuple):
    """The settings of single modules."""

    ranks: Mapping[ModuleKey, Entry]
    alphas: Mapping[ModuleKey, Entry]
    learning_rates: Mapping[ModuleKey, Entry]

    def rank(self, key: ModuleKey) -> int | None:
        return int(self.ranks[key].value) if key in self.ranks else None

    def alpha(self, key: ModuleKey) -> float | None:
        return self.alphas[key].value if key in self.alphas else None

    def learning_rate(self, key: ModuleKey) -> float | None:
        return self.learning_rates[key].value if key in self.learning_rates else None


def _module_settings(
    trained: Mapping[str, Mapping[str, nn.Module]],
    declared: Mapping[str, Part],
    config: AdapterConfig,
    learning_rates: Sequence[str],
) -> _ModuleSettings:
    sized = {part: modules for part, modules in trained.items() if part not in config.full}
    scope = Scope("adapter.module_ranks", sized, declared, config.full, "trained module")
    return _ModuleSettings(
        settle(config.module_ranks, scope),
        settle(config.module_alphas, replace(scope, key="adapter.module_alphas")),
        settle(learning_rates, Scope("train.module_learning_rates", trained, declared, noun="trained module")),
    )


def _check_numbers(config: AdapterConfig, variant: Variant) -> None:
    if config.rank < 1:
        raise ConfigError(f"adapter.rank={config.rank} must be 1 or greater.")
    if config.alpha is not None and config.alpha <= 0:
        raise ConfigError(f"adapter.alpha={config.alpha:g} must be greater than 0; drop it to take the rank.")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"adapter.dropout={config.dropout:g} must be at least 0 and less than 1.")
    if config.dropout and not variant.has_dropout:
        able = ", ".join(other.name for other in variants.every() if other.has_dropout)
        raise ConfigError(
            f"adapter.dropout={config.dropout:g} does not work with adapter.variant={config.variant}, which has no "
            f"input of its own to drop; set it to 0, or train one of {able}."
        )
    if config.lokr_factor != AdapterConfig.lokr_factor and variant.name != "lokr":
        raise ConfigError(
            f"adapter.lokr_factor={config.lokr_factor} is only used with adapter.variant=lokr, not {variant.name}."
        )


def _check_convolutions(modules: Sequence[PlannedModule], config: AdapterConfig, single: _ModuleSettings) -> None:
    wide = [module.key for module in modules if _is_wide(module.shape)]
    for name, entries in (("conv_rank", single.ranks), ("conv_alpha", single.alphas)):
        if getattr(config, name) is None or any(key not in entries for key in wide):
            continue
        reason = "no convolution larger than 1x1 is among the targets; add conv to adapter.targets"
        if wide:
            reason = (
                f"all convolutions larger than 1x1 have their own in adapter.module_{name[5:]}s; take one out there"
            )
        raise ConfigError(
            f"adapter.{name}={getattr(config, name):g} has no module to act on, since {reason} or drop this key."
        )


def _check_parts(parts: Sequence[str], meta_modules: Mapping[str, nn.Module], declared: Mapping[str, Part]) -> None:
    if not parts:
        raise ConfigError(f"adapter.parts is empty; name one or more of {', '.join(declared)}.")
    for part in parts:
        if part not in declared or part not in meta_modules:
            present = [name for name in declared if name in meta_modules]
            raise ConfigError(
                f'adapter.parts: the base has no part "{part}"{suggestion(part, present)}. Use {", ".join(present)}.'
            )


def _check_full(config: AdapterConfig, variant: Variant) -> None:
    for part in config.full:
        if part not in config.parts:
            raise ConfigError(f"adapter.full asks for {part}, which is not trained; add it to adapter.parts.")
    if config.full and variant.stored != variants.FULL.stored:
        able = ", ".join(other.name for other in variants.every() if other.stored == variants.FULL.stored)
        raise ConfigError(
            f"adapter.full={_listed(config.full)} does not go with adapter.variant={variant.name}, since PEFT holds "
            f"one variant in a file; use one of {able}."
        )


def _check_ranks(
    modules: Sequence[PlannedModule], config: AdapterConfig, variant: Variant, single: _ModuleSettings
) -> None:
    limits: dict[str, dict[PlannedModule, int]] = {}
    for module in modules if variant.has_largest_rank else ():
        if not module.identity:
            key = "conv_rank" if config.conv_rank is not None and _is_wide(module.shape) else "rank"
            source = str(single.ranks.get(module.key, f"adapter.{key}={module.rank}"))
            limits.setdefault(source, {})[module] = variants.largest_rank(module.shape)
    for source, largest in limits.items():
        small = [module for module, limit in largest.items() if module.rank > limit]
        if small:
            raise ConfigError(
                f"{source} is larger than {len(small)} of the matched modules can hold; the largest rank that fits all "
                f"of them is {min(largest.values())}. Lower the rank or name other targets.",
                [f"{module.part}/{module.path} holds rank {largest[module]} at most" for module in small[:MAX_LISTED]],
            )


def _check_alphas(modules: Sequence[PlannedModule], single: _ModuleSettings) -> None:
    used = {single.alphas[module.key] for module in modules if module.key in single.alphas and module.is_scaled}
    for entry in single.alphas.values():
        if entry not in used:
            raise ConfigError(
                f"{entry} does nothing, since lokr holds all that it matches as two whole factors, which have no "
                "scale; lower their rank or drop it."
            )


def _planned(
    key: ModuleKey, module: nn.Module, config: AdapterConfig, variant: Variant, single: _ModuleSettings
) -> PlannedModule:
    shape = tuple(module.get_parameter("weight").shape)
    if key.part in config.full:
        return _planned_in_full(key, layer_type(module), shape)
    size = _size(shape, config, variant.alpha_power)
    rank, alpha = _resized(size, single.rank(key), single.alpha(key), variant.alpha_power)
    tensors = variant.shapes(shape, rank, config.lokr_factor)
    return PlannedModule(
        part=key.part,
        path=key.path,
        layer_type=layer_type(module),
        shape=shape,
        rank=rank,
        alpha=alpha,
        tensors=tensors,
        num_parameters=sum(math.prod(shape) for shape in tensors.values()),
    )


def _planned_in_full(key: ModuleKey, layer: str, shape: tuple[int, ...]) -> PlannedModule:
    rank = variants.largest_rank(shape)
    tensors = variants.FULL.shapes(shape, rank, -1)
    # The square factor is the identity, so that the other is the change of the weight.
    identity = "down" if rank == math.prod(shape[1:]) else "up"
    trained = math.prod(shape)
    return PlannedModule(key.part, key.path, layer, shape, rank, float(rank), tensors, trained, identity)


def _size(shape: Sequence[int], config: AdapterConfig, power: float) -> tuple[int, float]:
    """Returns rank and alpha; the scale is alpha / rank, and what has no alpha of its own keeps that of all else."""
    alpha = config.rank if config.alpha is None else config.alpha
    size = config.rank, alpha * config.rank**power
    return _resized(size, config.conv_rank, config.conv_alpha, power) if _is_wide(shape) else size


def _resized(size: tuple[int, float], rank: int | None, alpha: float | None, power: float) -> tuple[int, float]:
    new_rank = size[0] if rank is None else rank
    if alpha is None:
        return new_rank, size[1] if new_rank == size[0] else size[1] * new_rank / size[0]
    return new_rank, alpha * new_rank**power


def _is_wide(shape: Sequence[int]) -> bool:
    return math.prod(shape[2:]) > 1


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _listed(words: Sequence[str]) -> str:
    return "[" + ", ".join(words) + "]"
