"""How PEFT would make the lokr layers of an adapter, since it works their sizes out instead of reading them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lora_diffusion.core.delta import kronecker_split
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.types import ModuleAdapter

_KERNELS = (1, 9)
"""Sizes of kernels that a flattened factor may hold; the tensors do not tell."""
_SHOWN = 10


class _Sizes(NamedTuple):
    first: tuple[int, int]
    second: tuple[tuple[int, int], ...]
    """One pair for each size of kernel that it may have."""
    is_first_whole: bool
    is_second_whole: bool
    rank: int


def is_whole(adapter: ModuleAdapter) -> bool:
    """Says whether an adapter is lokr with two factors that are not low-rank, so that its alpha means nothing."""
    return {"w1", "w2"} <= adapter.tensors.keys()


def peft_rank(adapter: ModuleAdapter) -> int:
    """Returns the rank that PEFT must be told: for two whole factors, one that makes it leave them whole."""
    if is_whole(adapter):
        return int(max(*adapter.tensors["w1"].shape, *adapter.tensors["w2"].shape[:2]))
    return adapter.rank


def kronecker_settings(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Returns the settings with which PEFT makes layers of these sizes.

    Raises:
        UnsupportedError: there are none.
    """
    sizes = {path: _sizes(adapter) for path, adapter in adapters.items()}
    sides = {side for own in sizes.values() for side in own.first}
    is_both = any(not own.is_first_whole for own in sizes.values())
    for factor in (-1, *sorted(sides)):
        if all(_is_made(own, factor, is_both) for own in sizes.values()):
            return {"decompose_factor": factor, "decompose_both": is_both}
    odd = [path for path, own in sizes.items() if not any(_is_made(own, factor, is_both) for factor in (-1, *sides))]
    raise UnsupportedError(
        "PEFT cannot hold this lokr adapter, since it works out the sizes of the factors from one setting, and no "
        "setting gives these. Keep it in kohya's spelling.",
        (odd or list(sizes))[:_SHOWN],
    )


def _sizes(adapter: ModuleAdapter) -> _Sizes:
    tensors = adapter.tensors
    first = tuple(tensors["w1"].shape) if "w1" in tensors else (len(tensors["w1_a"]), tensors["w1_b"].shape[1])
    if "w2" in tensors:
        seconds: Sequence[tuple[int, int]] = [(tensors["w2"].shape[0], tensors["w2"].shape[1])]
    elif "t2" in tensors:
        seconds = [(tensors["w2_a"].shape[1], tensors["w2_b"].shape[1])]
    else:
        outputs, inputs = tensors["w2_a"].shape[0], tensors["w2_b"].shape[1]
        seconds = [(outputs, inputs // kernel) for kernel in _KERNELS if inputs % kernel == 0]
    return _Sizes((first[0], first[1]), tuple(seconds), "w1" in tensors, "w2" in tensors, peft_rank(adapter))


def _is_made(sizes: _Sizes, factor: int, is_both: bool) -> bool:
    """Says whether PEFT makes a module of these sizes; see LoKrLayer.update_layer in peft 0.21."""
    first_whole = not (is_both and sizes.rank < max(sizes.first) / 2)
    return first_whole == sizes.is_first_whole and any(
        kronecker_split(sizes.first[0] * second[0], factor) == (sizes.first[0], second[0])
        and kronecker_split(sizes.first[1] * second[1], factor) == (sizes.first[1], second[1])
        and (sizes.rank >= max(second) / 2) == sizes.is_second_whole
        for second in sizes.second
    )
