"""What a data set holds, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.data import sample_types
from lora_diffusion.data.sample_types import Report


@dataclass(frozen=True)
class CheckedData:
    """A data set without errors."""

    report: Report

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return vars(self.report)

    def text(self) -> str:
        """Returns lines for people."""
        # Names of files may hold line breaks.
        return "\n".join([*(line.replace("\n", r"\n") for line in self.report.lines()), "No errors."])


def check_data(config: Config, *, base_is_named: bool = True) -> CheckedData:
    """Reads the data of a config as `train` does, and describes it; loads no weights, writes nothing.

    Args:
        config: data and base.
        base_is_named: the user did name the base; else captions may be as long as CLIP reads them.

    Raises:
        InputError: the base or the data cannot be used; all errors of the data are listed at once.
    """
    family: Family = registry.find("families", config.model.family)
    sample_type = sample_types.find(family.sample_type)
    info = family.check(config.model)
    if not base_is_named:
        info = replace(info, text_limit=ClipTextLimit())
    return CheckedData(sample_type.describe(sample_type.read(config.data, info)))
