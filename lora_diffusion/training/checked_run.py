"""The pieces of a training run, once all of them have been checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_diffusion.adapters.plan import InjectionPlan
from lora_diffusion.adapters.variants import Variant
from lora_diffusion.config.schema import Config
from lora_diffusion.core.base_model import BaseInfo, Loaded, LossOutput
from lora_diffusion.core.protocols.family import Family, step_loss
from lora_diffusion.core.samples import Batch, Request, Sample
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.training.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class CheckedRun:
    """A run that can start; nothing of it is loaded yet."""

    config: Config
    """As it was given, but for what has given way to the command line."""
    family: Family
    sample_type: SampleType
    variant: Variant
    info: BaseInfo
    meta_modules: Mapping[str, nn.Module]
    """Part -> network without weights."""
    plan: InjectionPlan
    folder: RunFolder
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    """What is scored and not trained on."""
    num_steps: int
    requests: Sequence[Request]
    """What previews answer; none where no preview is due."""

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parts that are trained."""
        return frozenset(self.config.adapter.parts)

    def loss(self, loaded: Loaded) -> Callable[[Batch, torch.Generator], LossOutput]:
        """Returns what gives the loss of each sample of a batch, drawing from the generator that it is handed."""
        return step_loss(self.family, loaded)
