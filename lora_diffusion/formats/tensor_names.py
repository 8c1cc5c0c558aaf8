"""How tensors are called in adapter files, and how they become modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from lora_diffusion.algebra.delta import change_shape
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.tensorfile.arrays import Array, widen

if TYPE_CHECKING:
    from lora_diffusion.core.keymap import KeyMap


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


PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name in its own files."""

_FACTORS = {
    **{f".lora_{name}.weight": name for name in ("down", "up", "mid")},
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    # What save_lora_weights of diffusers wrote for attention, by age.
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
}
_OLDEST = (".down.weight", ".up.weight")
_MAGNITUDES = {
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude_out",
    ".lora_magnitude_vector.weight": "magnitude_out",
}
_LOHA = {f".hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
_LOKR = {f".lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
_WHOLE: Mapping[str, Mapping[str, str]] = {
    "full": {"diff": ".diff", "bias": ".diff_b"},
    "norm": {"diff": ".w_norm", "bias": ".b_norm"},
    "set": {"value": ".set_weight"},
    "ia3": {"factor": ".weight", "on_input": ".on_input"},
    "oft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "boft": {"blocks": ".oft_blocks", "rescale": ".rescale"},
    "glora": {name: f".{name}.weight" for name in ("a1", "a2", "b1", "b2")},
}
_IA3 = ".weight"
SUFFIXES: Mapping[str, tuple[str, str]] = {
    **{suffix: ("lora", name) for suffix, name in _FACTORS.items()},
    **{suffix: ("loha", name) for suffix, name in _LOHA.items()},
    **{suffix: ("lokr", name) for suffix, name in _LOKR.items()},
    # What has four dimensions is boft, and what ends in .weight is an ia3 only beside an .on_input.
    **{
        suffix: (kind, name)
        for kind, own in _WHOLE.items()
        for name, suffix in own.items()
        if kind != "boft" and suffix != _IA3
    },
    **{suffix: ("", name) for suffix, name in _MAGNITUDES.items()},
    ".alpha": ("", "alpha"),
    # Changes of biases stand beside adapters of any kind.
    ".diff_b": ("", "bias"),
    ".b_norm": ("", "bias"),
    ".reshape_weight": ("", "shape"),
}
"""End of a tensor's name -> the kind of adapter that it belongs to, and its name there. Read in every format."""
KOHYA: Mapping[str, Mapping[str, str]] = {
    "lora": {name: f".lora_{name}.weight" for name in ("down", "up", "mid")} | {"magnitude": ".dora_scale"},
    "loha": {name: suffix for suffix, name in _LOHA.items()} | {"magnitude": ".dora_scale"},
    "lokr": {name: suffix for suffix, name in _LOKR.items()} | {"magnitude": ".dora_scale"},
    **_WHOLE,
}
"""Kind -> tensor -> how kohya, LyCORIS and ComfyUI write it; a change of the bias beside other kinds is .diff_b."""
PEFT: Mapping[str, Mapping[str, str]] = {
    "lora": {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
    "loha": {name: suffix for suffix, name in _LOHA.items()},
    "lokr": {name: suffix for suffix, name in _LOKR.items()},
}
"""Kind -> tensor -> how PEFT writes it."""

_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$)[\w-]+(\.weight)?$")
"""PEFT's names of a live model, which hold the adapter's name: .lora_A.default.weight."""
_COMPLETE: Mapping[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({"down", "up"}),),
    "loha": (frozenset({"w1_a", "w1_b", "w2_a", "w2_b"}),),
    "lokr": tuple(
        frozenset({*first, *second}) for first in (("w1",), ("w1_a", "w1_b")) for second in (("w2",), ("w2_a", "w2_b"))
    ),
    "full": (frozenset({"diff"}),),
    "norm": (frozenset({"diff"}),),
    "set": (frozenset({"value"}),),
    "ia3": (frozenset({"factor", "on_input"}),),
    "oft": (frozenset({"blocks"}),),
    "glora": (frozenset({"a1", "a2", "b1", "b2"}),),
}
_UNREAD = {
    r"\.boft_": "boft as PEFT writes it",
    r"^oft_": "oft as kohya's networks.oft writes it",
    r"\.oft_(R|diag)": "oft as PEFT or LyCORIS before 2024 writes it",
    r"\.ia3_l": "ia3 as PEFT writes it",
    r"\.bm\.weight$": "glora with a Tucker core",
    r"\.scale$": "lora with a scale of its own",
    r"\.bias_(indices|values|size)$": "lora with a sparse bias",
}
"""Expression found in a name -> kind of adapter that is known, but not read."""
EMBEDDING = "bundle_emb."
"""How names of text embeddings begin that OneTrainer packs into an adapter file, and A1111 reads."""
_SHOWN = 10


@dataclass
class Group:
    """The tensors of one module in a file."""

    kinds: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    """Tensor of the adapter -> its name in the file; "alpha" among them."""

    @property
    def lacking(self) -> list[str]:
        """Returns the tensors without which those that are there mean nothing."""
        if len(self.kinds) != 1:
            return []
        if self.kinds == {"full"} and "bias" in self.names:
            return []
        wanted = _COMPLETE[next(iter(self.kinds))]
        return min((sorted(choice - self.names.keys()) for choice in wanted), key=len)


def split_name(name: str) -> tuple[str, str, str] | None:
    """Returns module, kind and tensor of a name, or None where it ends in no known way.

    >>> split_name("lora_unet_conv_in.hada_w1_a")
    ('lora_unet_conv_in', 'loha', 'w1_a')
    """
    plain = _ADAPTER_NAME.sub(r".\1\2", name)
    for suffix, (kind, tensor) in SUFFIXES.items():
        # The oldest names end as those of many other modules do.
        if plain.endswith(suffix) and (suffix not in _OLDEST or plain.removesuffix(suffix).endswith("_lora")):
            return plain.removesuffix(suffix), kind, tensor
    return None


def _find_place(name: str, names: Collection[str]) -> tuple[str, str, str] | None:
    """Returns module, kind and tensor of a name among all names of a file."""
    if name.startswith(EMBEDDING):
        return None
    if name.endswith(_IA3) and f"{name.removesuffix(_IA3)}.on_input" in names:
        return name.removesuffix(_IA3), "ia3", "factor"
    return split_name(name)


def group_names(names: Collection[str]) -> tuple[dict[str, Group], list[str]]:
    """Returns the tensors of each module, and the names that end in no known way or say again what another says."""
    groups: dict[str, Group] = {}
    strange = []
    for name in names:
        found = _find_place(name, names)
        if found is None or found[2] in groups.get(found[0], Group()).names:
            strange.append(name)
            continue
        module, kind, tensor = found
        group = groups.setdefault(module, Group())
        group.names[tensor] = name
        group.kinds |= {kind} - {""}
    for group in groups.values():
        # A bias may change alone.
        if not group.kinds and group.names.keys() == {"bias"}:
            group.kinds.add("full")
    return groups, strange


def split_embeddings(tensors: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Returns the tensors of adapters, and the text embeddings packed beside them by their names there."""
    packed = {name for name in tensors if name.startswith(EMBEDDING)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in packed}
    return plain, {name.removeprefix(EMBEDDING): tensors[name] for name in tensors if name in packed}


def unread_kind(name: str) -> str | None:
    """Returns the kind of adapter that is known but not read, if a tensor's name gives one away."""
    return next((kind for mark, kind in _UNREAD.items() if re.search(mark, name)), None)


def refuse_unread(names: Iterable[str], source: Path) -> None:
    """Raises where a tensor belongs to a kind of adapter that is known but not read.

    Raises:
        UnsupportedError: names the kind.
    """
    found = next(((kind, name) for name in names if (kind := unread_kind(name))), None)
    if found:
        raise UnsupportedError(
            f"{source} holds an adapter of the kind {found[0]} ({shown(found[1])}), which cannot be read; merge it "
            "into its base with the program that made it. What can be read: lora, loha and lokr with and without dora, "
            "full differences, norms, and ia3, oft, boft and glora as LyCORIS writes them."
        )


def read_modules(
    tensors: Mapping[str, Array],
    key_map: KeyMap,
    find_alpha: Callable[[str], float | None],
    source: Path,
) -> dict[ModuleKey, ModuleAdapter]:
    """Turns the tensors of a file into modules, whatever mixture of spellings and kinds they are in.

    Args:
        tensors: name -> array, as stored.
        key_map: knows the module names.
        find_alpha: module name -> alpha; None means that it equals the rank.
        source: the file, for messages.

    Returns:
        modules with the arrays as they are.

    Raises:
        AdapterFileError: a name without meaning, half a pair, an unknown module, one named twice, or factors that do
            not fit.
        UnsupportedError: another kind of adapter.
    """
    groups, strange = group_names(tensors)
    _refuse_strange(strange, source)
    _refuse_incomplete(groups, source)
    if not groups:
        raise AdapterFileError(f"{source} holds no adapter.")
    groups = _without_idle(groups, tensors, key_map, source)
    key_map.require(groups, str(source))
    adapters: dict[ModuleKey, ModuleAdapter] = {}
    twice = []
    for name, group in groups.items():
        key = key_map.key(name)
        if key in adapters:
            twice.append(f"{key.part}/{key.path}: {name} and another name")
        own = {tensor: tensors[full] for tensor, full in group.names.items() if tensor != "alpha"}
        alpha = find_alpha(name) if "alpha" in group.names or group.kinds & SCALED else None
        adapters[key] = make_adapter(name, next(iter(group.kinds)), own, alpha, source)
    if twice:
        raise AdapterFileError(
            f"{source} names {len(twice)} modules twice, in different spellings, and every program takes another of "
            "the two; get the file again.",
            twice[:_SHOWN],
        )
    warn_of_limits(adapters, source)
    return adapters


def _without_idle(
    groups: Mapping[str, Group], tensors: Mapping[str, Array], key_map: KeyMap, source: Path
) -> dict[str, Group]:
    """Returns the modules without those that the base lacks and that change nothing, and warns of them.

    ComfyUI extracts the projection of CLIP-L too, which no base of Stable Diffusion has, as a change of zero.
    """
    idle = [name for name, group in groups.items() if name not in key_map and _is_idle(group, tensors)]
    if idle and len(idle) < len(groups):
        logger.warning(
            "%s: %d modules that this base does not have change nothing and are left out: %s",
            source,
            len(idle),
            name_some(idle),
        )
    return {name: group for name, group in groups.items() if name not in idle} or dict(groups)


def _is_idle(group: Group, tensors: Mapping[str, Array]) -> bool:
    zero = {tensor: not widen(tensors[name]).any() for tensor, name in group.names.items()}
    if group.kinds == {"lora"}:
        return (zero.get("up", False) or zero.get("down", False)) and zero.get("bias", True)
    return group.kinds == {"full"} and all(zero[tensor] for tensor in ("diff", "bias") if tensor in zero)


def one_alpha(tensor: Array, name: str, source: Path) -> float:
    """Returns the alpha that a tensor holds.

    Raises:
        AdapterFileError: it is not one number.
    """
    if tensor.size != 1:
        raise AdapterFileError(f"{source}: {name} must be one number, not {list(tensor.shape)}; get the file again.")
    # The shortest text that names a float32, so that 1.3 comes back as 1.3.
    return float(str(widen(tensor).reshape(-1)[0]))


def _refuse_incomplete(groups: Mapping[str, Group], source: Path) -> None:
    mixed = [f"{name}: {' and '.join(sorted(group.kinds))}" for name, group in groups.items() if len(group.kinds) > 1]
    if mixed:
        raise UnsupportedError(f"{source} gives {len(mixed)} modules several kinds of adapter at once.", mixed[:_SHOWN])
    halves = [f"{name} lacks {' and '.join(group.lacking)}" for name, group in groups.items() if group.lacking]
    halves += [f"{name} has only {' and '.join(group.names)}" for name, group in groups.items() if not group.kinds]
    if halves:
        raise AdapterFileError(f"{source}: {len(halves)} modules are incomplete; get the file again.", halves[:_SHOWN])
    extra = [
        f"{name}: {' and '.join(group.kinds)} with dora"
        for name, group in groups.items()
        if not group.kinds <= {"lora", "loha", "lokr"} and {*MAGNITUDES} & group.names.keys()
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
