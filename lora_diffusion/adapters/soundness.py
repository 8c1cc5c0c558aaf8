"""Whether an adapter's numbers can be used at all."""

from __future__ import annotations

import math

from lora_diffusion.core.delta import change_shape, delta_norm
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.types import AdapterState

HARMFUL_RMS = 100.0
"""Root mean square of a change that leaves nothing of a base, whose weights have 0.01 to 0.2; float16 overflows."""


def check_sizes(state: AdapterState, source: str) -> None:
    """Checks that no change of weight is so large that pictures become noise or NaN.

    Args:
        state: the adapter; of a DoRA, the change before its magnitude is looked at.
        source: names the adapter in messages.

    Raises:
        AdapterFileError: lists up to ten modules.
    """
    sizes = {key: delta_norm(adapter) / math.prod(change_shape(adapter)) ** 0.5 for key, adapter in state}
    harmful = [f"{key.part}/{key.path}: {size:.3g}" for key, size in sizes.items() if not size <= HARMFUL_RMS]
    if harmful:
        raise AdapterFileError(
            f"{source} changes {len(harmful)} modules by more than {HARMFUL_RMS:g} for each weight; a base has "
            "0.01 to 0.2. Its training went wrong, or its alphas are; use an earlier checkpoint.",
            harmful[:10],
        )
