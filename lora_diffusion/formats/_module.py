"""The tensors of one module in a file become its adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from lora_diffusion.core.delta import change_shape
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.core.types import ModuleAdapter, ModuleKey
from lora_diffusion.formats._arrays import widen

FLAGS = ("on_input",)
"""Tensors that are no weights, and keep their dtype."""
SCALED = frozenset(("lora", "loha", "lokr", "glora"))
"""Kinds whose change is multiplied with alpha / rank."""


def make_adapter(name: str, kind: str, tensors: dict[str, Any], alpha: float | None, source: Path) -> ModuleAdapter:
    """Returns the adapter of one module.

    Args:
        name: of the module in the file, for messages.
        kind: what the names of its tensors tell.
        tensors: arrays by their names in ModuleAdapter, "magnitude_out" for a magnitude along the outputs, and "shape".
        alpha: None means that it equals the rank, and of rotations that they have no limit.
        source: the file.

    Raises:
        AdapterFileError: the tensors do not fit each other.
        UnsupportedError: the weight is to be filled up to another shape.
    """
    kind = "boft" if kind == "oft" and tensors["blocks"].ndim == 4 else kind
    shape = tensors.pop("shape", None)
    _check_sizes(ModuleAdapter(kind, tensors, 0.0), name, source)
    variant, tensors = _with_magnitude(name, kind, tensors, source)
    adapter = ModuleAdapter(variant, tensors, 0.0)
    if shape is not None:
        _check_shape(adapter, [int(side) for side in widen(shape).reshape(-1)], name, source)
    if kind in SCALED:
        return replace(adapter, alpha=float(adapter.rank) if alpha is None else alpha)
    return replace(adapter, alpha=alpha or 0.0)


def _check_sizes(adapter: ModuleAdapter, name: str, source: Path) -> None:
    """Checks that the tensors of a module fit each other, as far as that can be told without its base."""
    try:
        if adapter.variant not in ("ia3", "oft", "boft") and adapter.changes_weight:
            change_shape(adapter)
    except AdapterFileError as error:
        raise AdapterFileError(f"{source}: {name}. {error}") from error
    blocks = adapter.tensors.get("blocks")
    is_square = blocks is None or (blocks.ndim in (3, 4) and blocks.shape[-1] == blocks.shape[-2])
    if not is_square or adapter.tensors.get("on_input", numpy.zeros(1)).size != 1:
        raise AdapterFileError(
            f"{source}: {name}. The tensors of a {adapter.variant} adapter do not fit; get it again."
        )


def _check_shape(adapter: ModuleAdapter, shape: list[int], name: str, source: Path) -> None:
    """Checks that the shape to which ComfyUI fills up a weight with zeros is that of the change, and so says nothing.

    Raises:
        UnsupportedError: it is another.
    """
    if (shape[0], math.prod(shape[1:])) != change_shape(adapter):
        raise UnsupportedError(
            f"{source}: {name} changes a weight of another shape than the {shape} that its reshape_weight asks for, "
            "which cannot be read; use it in ComfyUI."
        )


MAGNITUDES = ("magnitude", "magnitude_out")


def fits_magnitude(tensors: Mapping[str, Any]) -> bool:
    """Says whether factors come without a magnitude, or with one of the size of the weight's inputs or outputs.

    The inputs may be known only times the size of the kernel: some programs write factors of convolutions flat.
    """
    found = [tensors[name] for name in MAGNITUDES if name in tensors]
    if len(found) != 1:
        return not found
    kind = "lora" if "down" in tensors else "loha" if "w2_b" in tensors and "w1_b" in tensors else "lokr"
    kind = "lokr" if {"w1", "w2"} & tensors.keys() else kind
    plain = {name: tensor for name, tensor in tensors.items() if name not in MAGNITUDES}
    outputs, inputs = change_shape(ModuleAdapter(kind, plain, 0.0))
    if not _is_row(tensors) or not found[0].size:
        return bool(found[0].size == outputs)
    if "down" in tensors and tensors["down"].ndim > 2:
        inputs = tensors["down"].shape[1]
    return inputs % found[0].size == 0 and inputs // found[0].size in _KERNELS


_KERNELS = (1, 9)
"""Sizes of the kernels of convolutions."""


def _is_row(tensors: Mapping[str, Any]) -> bool:
    """Says whether a magnitude runs along the inputs."""
    magnitude = tensors.get("magnitude")
    return magnitude is not None and magnitude.ndim > 1 and magnitude.shape[0] == 1 and "magnitude_out" not in tensors


def _with_magnitude(name: str, kind: str, tensors: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Returns the variant, and the tensors with the magnitude in the shape that ModuleAdapter gives it."""
    found = [tensor for tensor in MAGNITUDES if tensor in tensors]
    if not found:
        return kind, tensors
    if not fits_magnitude(tensors):
        plain = {name: tensor for name, tensor in tensors.items() if name not in MAGNITUDES}
        outputs, inputs = change_shape(ModuleAdapter(kind, plain, 0.0))
        raise AdapterFileError(
            f"{source}: {name} has a DoRA magnitude {list(tensors[found[0]].shape)}, but the weight has {inputs} inputs"
            f" and {outputs} outputs; get the file again."
        )
    is_row = _is_row(tensors)
    magnitude = tensors.pop(found[0])
    ones = (1,) * (tensors["down"].ndim - 2 if "down" in tensors else magnitude.ndim - 2)
    magnitude = magnitude.reshape((1, -1, *ones) if is_row else (-1, 1, *ones))
    variant = "dora" if is_row else "dora_out"
    return variant if kind == "lora" else f"{kind}+{variant}", {**tensors, "magnitude": magnitude}


def warn_of_limits(adapters: Mapping[ModuleKey, ModuleAdapter], source: Path) -> None:
    """Warns of rotations that alpha limits, since programs do not agree on the limit."""
    limited = [f"{key.part}/{key.path}" for key, adapter in adapters.items() if _is_limited(adapter)]
    if limited:
        logger.warning(
            "%s: alpha limits the rotations of %d modules. It is taken as ComfyUI takes it; A1111, and LyCORIS which "
            "trains such files, multiply it by the number of outputs: %s",
            source,
            len(limited),
            name_some(limited),
        )


def _is_limited(adapter: ModuleAdapter) -> bool:
    if "blocks" not in adapter.tensors or adapter.alpha <= 0:
        return False
    blocks: Any = adapter.tensors["blocks"]
    wide = widen(blocks)
    return bool(numpy.linalg.norm(wide - wide.swapaxes(-1, -2)) > adapter.alpha)
