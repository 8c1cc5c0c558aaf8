"""What a training run would do: all that is checked and planned, while nothing is loaded, trained or written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_diffusion.adapters.plan import InjectionPlan
from lora_diffusion.config.schema import Config
from lora_diffusion.data.sample_types import Report
from lora_diffusion.training import memory, run_folder
from lora_diffusion.workflows._checks import check
from lora_diffusion.workflows.estimate import step_memory


@dataclass(frozen=True)
class Outlook:
    """What a training run would do."""

    data: Report
    plan: InjectionPlan
    memory: memory.MemoryEstimate
    num_steps: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "data": vars(self.data),
            "plan": self.plan.to_json(),
            "memory": vars(self.memory) | {"total_bytes": self.memory.total_bytes},
            "steps": self.num_steps,
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [*self.data.lines(), *self.plan.lines(), *self.plan.module_lines(), self.memory.line()]
        return "\n".join([*lines, f"steps   {self.num_steps}", "Nothing was trained: this was a dry run."])


def dry_run(config: Config, *, resume: bool = False, overwrite: bool = False) -> Outlook:
    """Checks config, base and data as `train` does, and says what it would do; loads no weights, writes nothing.

    A folder that holds this very run is no fault, since it could be resumed; with `overwrite` any run may be there.
    """
    config = config if overwrite else run_folder.as_started(config)
    checked = check(config, resume=resume or not overwrite, overwrite=overwrite)
    largest = checked.sample_type.largest(checked.samples)
    needed = step_memory(checked.config, checked.family, checked.info, checked.skeleton, checked.plan, largest)
    return Outlook(checked.sample_type.describe(checked.samples), checked.plan, needed, checked.num_steps)
