"""What a training run would need and do, before anything is loaded: `estimate`, and `train --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lora_diffusion.adapters import variants
from lora_diffusion.adapters.plan import InjectionPlan
from lora_diffusion.adapters.plan import plan as make_plan
from lora_diffusion.adapters.shapes import inject_shapes
from lora_diffusion.config.schema import REQUIRED, Config
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.data import sample_types
from lora_diffusion.data.sample_types import Report
from lora_diffusion.quantize import layers_to_quantize, weight_bytes
from lora_diffusion.runtime.device import frozen_dtype, pick_device
from lora_diffusion.training import memory, optim, run_folder
from lora_diffusion.training.fake_tensor_step import use_placeholders
from lora_diffusion.workflows._run_checks import check, settle_variant

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Estimate:
    """What a training step would need."""

    plan: InjectionPlan
    memory: memory.MemoryEstimate
    size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        total = {"total_bytes": self.memory.total_bytes}
        return {"trained_parameters": self.plan.num_parameters, "size": self.size, **vars(self.memory), **total}

    def text(self) -> str:
        """Returns lines for people."""
        return "\n".join([*self.plan.lines(), self.memory.line()])


def estimate(config: Config) -> Estimate:
    """Predicts the peak memory of a training step from shapes alone; loads no weights.

    Images are taken to fill `data.resolution`; of other data the longest sample is looked up.

    Raises:
        InputError: the run could not start.
    """
    config = settle_variant(config)
    family: Family = registry.find("families", config.model.family)
    variants.find(config.adapter.variant, config.model.quantization)
    optim.check(config.train, pick_device())
    info = family.check(config.model)
    networks = family.meta_modules(config.model)
    plan = make_plan(networks, family.parts, config.adapter, config.train.module_learning_rates, info.unread)
    size = _size(config, family, info)
    return Estimate(plan, step_memory(config, family, info, networks, plan, size), size)


@dataclass(frozen=True)
class DryRunReport:
    """What a training run would do."""

    data: Report
    plan: InjectionPlan
    memory: memory.MemoryEstimate
    num_steps: int
    objective: tuple[str, ...] = ()
    """What is shown under which words, how often, and what for."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "data": vars(self.data),
            "plan": self.plan.to_json(),
            "memory": vars(self.memory) | {"total_bytes": self.memory.total_bytes},
            "steps": self.num_steps,
            "objective": list(self.objective),
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [*self.data.lines(), *self.objective, *self.plan.lines(), *self.plan.module_lines(), self.memory.line()]
        return "\n".join([*lines, f"steps   {self.num_steps}", "Nothing was trained: this was a dry run."])


def dry_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> DryRunReport:
    """Checks config, base and data as `train` does, and says what it would do; loads no weights, writes nothing.

    A folder that holds this very run is no error, since it could be resumed; with `overwrite` any run may be there.
    """
    config = config if overwrite else run_folder.as_started(config)
    checked = check(config, resume=resume or not overwrite, overwrite=overwrite)
    largest = checked.sample_type.largest(checked.samples)
    needed = step_memory(checked.config, checked.family, checked.info, checked.meta_modules, checked.plan, largest)
    objective = (*checked.sample_type.explain(checked.samples, config.model),)
    return DryRunReport(
        checked.sample_type.describe(checked.samples), checked.plan, needed, checked.num_steps, objective
    )


def step_memory(
    config: Config,
    family: Family,
    info: BaseInfo,
    networks: Mapping[str, nn.Module],
    plan: InjectionPlan,
    size: tuple[int, int],
) -> memory.MemoryEstimate:
    """Takes a step with fake tensors on samples of a size; the networks cannot be used afterwards."""
    device, trained = pick_device(), frozenset(config.adapter.parts)
    dtype, quantization = frozen_dtype(config.model.dtype, device), config.model.quantization
    example = family.example(config.model, trained, config.train.batch_size, size)
    called = {**networks, **example.heads}
    parts = {name: called[name] for name in example.inputs}
    weights = sum(weight_bytes(network, quantization, dtype) for network in parts.values())
    for network in parts.values():
        network.requires_grad_(False)
        use_placeholders(network, [path for path, _ in layers_to_quantize(network, quantization)], quantization)
    variant = variants.find(config.adapter.variant, quantization)
    loaded = Loaded(parts, {}, config.model, torch.device("meta"), info)
    params = inject_shapes(loaded, plan, variant, config.adapter.dropout)
    return memory.estimate(
        loaded.parts, example.inputs, params, config.train, weights_bytes=weights, dtype=dtype, device=device
    )


def _size(config: Config, family: Family, info: BaseInfo) -> tuple[int, int]:
    sample_type = sample_types.find(family.sample_type)
    if size := sample_type.assumed_size(config.data, info):
        return size
    if config.data.path == REQUIRED:
        raise ConfigError("data.path: must be given, since the longest sample decides how much memory a step needs.")
    return sample_type.largest(sample_type.read(config.data, info))
