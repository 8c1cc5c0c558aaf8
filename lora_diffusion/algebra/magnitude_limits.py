"""Whether the change of an adapter is implausibly large, or so large that nothing of the base is left."""

from __future__ import annotations

import math

from lora_diffusion.algebra.delta import change_shape, delta_norm
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError

IMPLAUSIBLE_RMS = 1.0
"""Root mean square of a change above which it overwhelms the weight: those of trained networks have 0.01 to 0.2."""
HARMFUL_RMS = 100.0
"""Root mean square of a change that leaves nothing of a base; float16 overflows."""
IMPLAUSIBLE = "module(s) whose change is larger than any weight, so that images fall to pieces"


def change_rms(adapter: ModuleAdapter, norm: float | None = None) -> float:
    """Returns the root mean square of a change of weight; of a DoRA, of that before its magnitude.

    0 of what changes the bias alone, and of what depends on the base in another way.

    Args:
        adapter: its tensors, or numpy arrays.
        norm: `delta_norm` of it, if that is known.

    Raises:
        AdapterFileError: the tensors do not fit each other.
    """
    is_relative = adapter.needs_base and "magnitude" not in adapter.tensors
    if is_relative or not adapter.changes_weight:
        return 0.0 if norm is None else norm
    num_weights = math.prod(change_shape(adapter))
    return (delta_norm(adapter) if norm is None else norm) / math.sqrt(num_weights) if num_weights else 0.0


def is_implausible(rms: float) -> bool:
    """Says whether a change of this root mean square is implausible, as it overwhelms the base; NaN is, too."""
    return not rms <= IMPLAUSIBLE_RMS


def check_magnitudes(state: AdapterState, source: str) -> None:
    """Checks that no change of weight is so large that images become noise or NaN.

    Args:
        state: the adapter; of a DoRA, the change before its magnitude is looked at.
        source: names the adapter in messages.

    Raises:
        AdapterFileError: lists up to ten modules.
    """
    sizes = {key: change_rms(adapter) for key, adapter in state}
    harmful = [f"{key.part}/{key.path}: {size:.3g}" for key, size in sizes.items() if not size <= HARMFUL_RMS]
    if harmful:
        raise AdapterFileError(
            f"{source} changes {len(harmful)} modules by more than {HARMFUL_RMS:g} for each weight; a base has "
            "0.01 to 0.2. Its training went wrong, or its alphas are; use an earlier checkpoint.",
            harmful[:10],
        )
