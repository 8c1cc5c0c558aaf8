"""What a data set holds, and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.protocols import Family
from lora_diffusion.data.kinds import KINDS, Report


def check_data(config: Config) -> Report:
    """Reads the data of a config as `train` does, and describes it; loads no weights, writes nothing.

    Raises:
        InputError: the base or the data cannot be used; all faults of the data are listed at once.
    """
    family: Family = registry.find("families", config.model.family)
    kind = KINDS[family.sample_type]
    return kind.describe(kind.read(config.data, family.check(config.model)))
