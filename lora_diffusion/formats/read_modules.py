"""The tensors of a parsed file as modules of a base, checked as far as that can be done without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from lora_diffusion.algebra.delta import change_shape
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.formats.tensor_names import EMBEDDING, ParsedModule, refuse_unread
from lora_diffusion.tensorfile.arrays import Array, upcast

if TYPE_CHECKING:
    from lora_diffusion.core.keymap import KeyMap

_SHOWN = 10
FLAGS = ("on_input",)
"""Tensors that are no weights, and keep their dtype."""
SCALED = frozenset(("lora", "loha", "lokr", "glora"))
"""Variants whose change is multiplied with alpha / rank."""


def _make_adapter(name: str, variant: str, tensors: dict[str, Any], alpha: float | None, source: Path) -> ModuleAdapter:
    """Returns the adapter of one module.

    Args:
        name: of the module in the file, for messages.
        variant: what the names of its tensors tell.
        tensors: arrays by their names in ModuleAdapter, "magnitude_out" for a magnitude along the outputs, and "shape".
        alpha: None means that it equals the rank, and of rotations that they have no limit.
        source: the file.

    Raises:
        AdapterFileError: the tensors do not fit each other.
        UnsupportedError: the weight is to be filled up to another shape.
    """
    variant = "boft" if variant == "oft" and tensors["blocks"].ndim == 4 else variant
    shape = tensors.pop("shape", None)
    _check_sizes(ModuleAdapter(variant, tensors, 0.0), name, source)
    variant, tensors = _with_magnitude(name, variant, tensors, source)
    adapter = ModuleAdapter(variant, tensors, 0.0)
    if shape is not None:
        _check_shape(adapter, [int(side) for side in upcast(shape).reshape(-1)], name, source)
    if variant in SCALED:
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
    magnitudes = [tensors[name] for name in MAGNITUDES if name in tensors]
    if len(magnitudes) != 1:
        return not magnitudes
    (magnitude,) = magnitudes
    variant = "lora" if "down" in tensors else "loha" if "w2_b" in tensors and "w1_b" in tensors else "lokr"
    variant = "lokr" if {"w1", "w2"} & tensors.keys() else variant
    plain = {name: tensor for name, tensor in tensors.items() if name not in MAGNITUDES}
    outputs, inputs = change_shape(ModuleAdapter(variant, plain, 0.0))
    if not _is_row(tensors) or not magnitude.size:
        return bool(magnitude.size == outputs)
    if "down" in tensors and tensors["down"].ndim > 2:
        inputs = tensors["down"].shape[1]
    return inputs % magnitude.size == 0 and inputs // magnitude.size in _KERNELS


_KERNELS = (1, 9)
"""Sizes of the kernels of convolutions."""


def _is_row(tensors: Mapping[str, Any]) -> bool:
    """Says whether a magnitude runs along the inputs."""
    magnitude = tensors.get("magnitude")
    return magnitude is not None and magnitude.ndim > 1 and magnitude.shape[0] == 1 and "magnitude_out" not in tensors


def _with_magnitude(name: str, variant: str, tensors: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Returns the variant, and the tensors with the magnitude in the shape that ModuleAdapter gives it."""
    names = [tensor for tensor in MAGNITUDES if tensor in tensors]
    if not names:
        return variant, tensors
    if not fits_magnitude(tensors):
        plain = {name: tensor for name, tensor in tensors.items() if name not in MAGNITUDES}
        outputs, inputs = change_shape(ModuleAdapter(variant, plain, 0.0))
        raise AdapterFileError(
            f"{source}: {name} has a DoRA magnitude {list(tensors[names[0]].shape)}, but the weight has {inputs} inputs"
            f" and {outputs} outputs; get the file again."
        )
    is_row = _is_row(tensors)
    magnitude = tensors.pop(names[0])
    ones = (1,) * (tensors["down"].ndim - 2 if "down" in tensors else magnitude.ndim - 2)
    magnitude = magnitude.reshape((1, -1, *ones) if is_row else (-1, 1, *ones))
    dora = "dora" if is_row else "dora_out"
    return dora if variant == "lora" else f"{variant}+{dora}", {**tensors, "magnitude": magnitude}


def _warn_of_limits(adapters: Mapping[ModuleKey, ModuleAdapter], source: Path) -> None:
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
    wide = upcast(blocks)
    return bool(numpy.linalg.norm(wide - wide.swapaxes(-1, -2)) > adapter.alpha)


def read_modules(
    parsed: tuple[Mapping[str, ParsedModule], Sequence[str]],
    tensors: Mapping[str, Array],
    key_map: KeyMap,
    find_alpha: Callable[[str], float | None],
    source: Path,
) -> dict[ModuleKey, ModuleAdapter]:
    """Turns the tensors of a file into modules, whatever mixture of formats and variants they are in.

    Args:
        parsed: module name -> its tensors, and the names without a place, as `tensor_names.module` gives them.
        tensors: name -> array, as stored, say [rank, in] and [out, rank]; see ModuleAdapter.
        key_map: knows the module names.
        find_alpha: module name -> alpha; None means that it equals the rank.
        source: the file, for messages.

    Returns:
        modules with the arrays as they are.

    Raises:
        AdapterFileError: a name without meaning, half a pair, an unknown module, one named twice, or factors that do
            not fit.
        UnsupportedError: another variant.
    """
    modules, strange = parsed
    _refuse_strange(strange, source)
    _refuse_incomplete(modules, source)
    if not modules:
        raise AdapterFileError(f"{source} holds no adapter.")
    modules = _without_idle(modules, tensors, key_map, source)
    key_map.require(modules, str(source))
    adapters: dict[ModuleKey, ModuleAdapter] = {}
    twice = []
    for name, module in modules.items():
        key = key_map.key(name)
        if key in adapters:
            twice.append(f"{key.part}/{key.path}: {name} and another name")
        stored = {tensor: tensors[full] for tensor, full in module.names.items() if tensor != "alpha"}
        alpha = find_alpha(name) if "alpha" in module.names or module.variants & SCALED else None
        adapters[key] = _make_adapter(name, next(iter(module.variants)), stored, alpha, source)
    if twice:
        raise AdapterFileError(
            f"{source} names {len(twice)} modules twice, in different formats, and every program takes another of "
            "the two; get the file again.",
            twice[:_SHOWN],
        )
    _warn_of_limits(adapters, source)
    return adapters


def _without_idle(
    modules: Mapping[str, ParsedModule], tensors: Mapping[str, Array], key_map: KeyMap, source: Path
) -> dict[str, ParsedModule]:
    """Returns the modules without those that the base lacks and that change nothing, and warns of them.

    ComfyUI extracts the projection of CLIP-L too, which no base of Stable Diffusion has, as a change of zero.
    """
    idle = [name for name, module in modules.items() if name not in key_map and _is_idle(module, tensors)]
    if idle and len(idle) < len(modules):
        logger.warning(
            "%s: %d modules that this base does not have change nothing and are left out: %s",
            source,
            len(idle),
            name_some(idle),
        )
    return {name: module for name, module in modules.items() if name not in idle} or dict(modules)


def _is_idle(module: ParsedModule, tensors: Mapping[str, Array]) -> bool:
    zero = {tensor: not upcast(tensors[name]).any() for tensor, name in module.names.items()}
    if module.variants == {"lora"}:
        return (zero.get("up", False) or zero.get("down", False)) and zero.get("bias", True)
    return module.variants == {"full"} and all(zero[tensor] for tensor in ("diff", "bias") if tensor in zero)


def split_embeddings(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the tensors of adapters, of any shape, and text embeddings packed beside them by their names there."""
    packed = {name: tensor for name, tensor in tensors.items() if name.startswith(EMBEDDING)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    return plain, {name.removeprefix(EMBEDDING): tensor for name, tensor in packed.items()}


def alpha_of(tensor: Array, name: str, source: Path) -> float:
    """Returns the alpha that a tensor, [] or [1], holds.

    Raises:
        AdapterFileError: it is not one number.
    """
    if tensor.size != 1:
        raise AdapterFileError(f"{source}: {name} must be one number, not {list(tensor.shape)}; get the file again.")
    # The shortest text that names a float32, so that 1.3 comes back as 1.3.
    return float(str(upcast(tensor).reshape(-1)[0]))


def _refuse_incomplete(modules: Mapping[str, ParsedModule], source: Path) -> None:
    mixed = [
        f"{name}: {' and '.join(sorted(module.variants))}"
        for name, module in modules.items()
        if len(module.variants) > 1
    ]
    if mixed:
        raise UnsupportedError(f"{source} gives {len(mixed)} modules several kinds of adapter at once.", mixed[:_SHOWN])
    halves = [f"{name} lacks {' and '.join(module.lacking)}" for name, module in modules.items() if module.lacking]
    halves += [
        f"{name} has only {' and '.join(module.names)}" for name, module in modules.items() if not module.variants
    ]
    if halves:
        raise AdapterFileError(f"{source}: {len(halves)} modules are incomplete; get the file again.", halves[:_SHOWN])
    extra = [
        f"{name}: {' and '.join(module.variants)} with dora"
        for name, module in modules.items()
        if not module.variants <= {"lora", "loha", "lokr"} and {*MAGNITUDES} & module.names.keys()
    ]
    if extra:
        raise UnsupportedError(
            f"{source}: {len(extra)} modules are of kinds that cannot be read; merge them into the base with the "
            "program that made them.",
            extra[:_SHOWN],
        )


def _refuse_strange(strange: Sequence[str], source: Path) -> None:
    if not strange:
        return
    refuse_unread(strange, source)
    raise AdapterFileError(
        f"{source}: {len(strange)} of its tensors have names that this format does not use, or name a module twice. "
        "See 'lora-diffusion inspect'.",
        strange[:_SHOWN],
    )
