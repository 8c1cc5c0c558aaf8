"""The published bases, one description each: names, sizes and prefixes; no weights.

A base that another package brings has its description with its family (`Family.architecture`) and is not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping

from lora_diffusion.architectures import llava, sd1, sd2, sdxl, whisper
from lora_diffusion.architectures.base import DiffusionArchitecture, TextOutputArchitecture
from lora_diffusion.core.base_model import Architecture

DIFFUSION: Mapping[str, DiffusionArchitecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE for module in (sd1, sd2, sdxl)
}
"""By name: those whose sizes and names in checkpoints are known without a base."""
TEXT_OUTPUT: Mapping[str, TextOutputArchitecture] = {
    module.ARCHITECTURE.name: module.ARCHITECTURE for module in (whisper, llava)
}
ARCHITECTURES: Mapping[str, Architecture] = {**DIFFUSION, **TEXT_OUTPUT}


def find_modelspec(text: str) -> Architecture | None:
    """Returns the architecture that a `modelspec.architecture` names, with or without "/lora"; None for others."""
    return next((architecture for architecture in ARCHITECTURES.values() if architecture.has_modelspec(text)), None)
