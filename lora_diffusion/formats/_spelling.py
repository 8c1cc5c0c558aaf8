"""How tensors are called in adapter files, and how they become modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.delta import change_shape
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import shown
from lora_diffusion.core.types import ModuleAdapter, ModuleKey
from lora_diffusion.formats._arrays import Array, widen

if TYPE_CHECKING:
    from lora_diffusion.core.keymap import KeyMap

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
SUFFIXES: Mapping[str, tuple[str, str]] = {
    **{suffix: ("lora", name) for suffix, name in _FACTORS.items()},
    **{suffix: ("loha", name) for suffix, name in _LOHA.items()},
    **{suffix: ("lokr", name) for suffix, name in _LOKR.items()},
    **{suffix: ("", name) for suffix, name in _MAGNITUDES.items()},
    ".alpha": ("", "alpha"),
}
"""End of a tensor's name -> the kind of adapter that it belongs to, and its name there. Read in every format."""
KOHYA: Mapping[str, Mapping[str, str]] = {
    "lora": {name: f".lora_{name}.weight" for name in ("down", "up", "mid")} | {"magnitude": ".dora_scale"},
    "loha": {name: suffix for suffix, name in _LOHA.items()},
    "lokr": {name: suffix for suffix, name in _LOKR.items()},
}
"""Kind -> tensor -> how kohya and LyCORIS write it."""
PEFT: Mapping[str, Mapping[str, str]] = {
    "lora": {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"},
    "loha": KOHYA["loha"],
    "lokr": KOHYA["lokr"],
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
}
_UNREAD = {
    r"\.boft_": "boft",
    r"\.oft_|^oft_|\.rescale$": "oft",
    r"\.diff(_b)?$": "full difference",
    r"\.[wb]_norm$": "norm",
    r"\.on_input$|\.ia3_l$": "ia3",
    r"\.[ab][12]\.weight$": "glora",
    r"\.scale$": "lora with a scale of its own",
    r"^bundle_emb\.": "embedding",
}
"""Expression found in a name -> kind of adapter that is known, but not read."""
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


def group_names(names: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    """Returns the tensors of each module, and the names that end in no known way or say again what another says."""
    groups: dict[str, Group] = {}
    strange = []
    for name in names:
        found = split_name(name)
        if found is None or found[2] in groups.get(found[0], Group()).names:
            strange.append(name)
            continue
        module, kind, tensor = found
        group = groups.setdefault(module, Group())
        group.names[tensor] = name
        group.kinds |= {kind} - {""}
    return groups, strange


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
            f"{source} holds an adapter of the kind {found[0]} ({shown(found[1])}); lora, dora, loha and lokr can be "
            "read."
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
    key_map.require(groups, str(source))
    adapters: dict[ModuleKey, ModuleAdapter] = {}
    twice = []
    for name, group in groups.items():
        key = key_map.key(name)
        if key in adapters:
            twice.append(f"{key.part}/{key.path}: {name} and another name")
        own = {tensor: tensors[full] for tensor, full in group.names.items() if tensor != "alpha"}
        adapters[key] = _adapter(name, next(iter(group.kinds)), own, find_alpha(name), source)
    if twice:
        raise AdapterFileError(
            f"{source} names {len(twice)} modules twice, in different spellings, and every program takes another of "
            "the two; get the file again.",
            twice[:_SHOWN],
        )
    return adapters


def one_alpha(tensor: Array, name: str, source: Path) -> float:
    """Returns the alpha that a tensor holds.

    Raises:
        AdapterFileError: it is not one number.
    """
    if tensor.size != 1:
        raise AdapterFileError(f"{source}: {name} must be one number, not {list(tensor.shape)}; get the file again.")
    # The shortest text that names a float32, so that 1.3 comes back as 1.3.
    return float(str(widen(tensor).reshape(-1)[0]))


def _adapter(name: str, kind: str, tensors: dict[str, Any], alpha: float | None, source: Path) -> ModuleAdapter:
    try:
        change_shape(ModuleAdapter(kind, tensors, 0.0))
    except AdapterFileError as error:
        raise AdapterFileError(f"{source}: {name}. {error}") from error
    variant, tensors = _with_magnitude(name, tensors, source) if kind == "lora" else (kind, tensors)
    adapter = ModuleAdapter(variant, tensors, 0.0)
    return replace(adapter, alpha=float(adapter.rank) if alpha is None else alpha)


_MAGNITUDE_NAMES = ("magnitude", "magnitude_out")


def fits_magnitude(tensors: Mapping[str, Any]) -> bool:
    """Says whether lora factors come without a magnitude, or with one of the size of the weight's inputs or outputs."""
    found = [tensors[name] for name in _MAGNITUDE_NAMES if name in tensors]
    size = tensors["down"].shape[1] if _is_row(tensors) else tensors["up"].shape[0]
    return not found or (len(found) == 1 and found[0].size == size)


def _is_row(tensors: Mapping[str, Any]) -> bool:
    """Says whether a magnitude runs along the inputs."""
    magnitude = tensors.get("magnitude")
    return magnitude is not None and magnitude.ndim > 1 and magnitude.shape[0] == 1 and "magnitude_out" not in tensors


def _with_magnitude(name: str, tensors: dict[str, Any], source: Path) -> tuple[str, dict[str, Any]]:
    """Returns the variant, and the tensors with the magnitude in the shape that ModuleAdapter gives it."""
    found = [tensor for tensor in _MAGNITUDE_NAMES if tensor in tensors]
    if not found:
        return "lora", tensors
    fits, is_row = fits_magnitude(tensors), _is_row(tensors)
    magnitude = tensors.pop(found[0])
    down, up = tensors["down"], tensors["up"]
    inputs, outputs, ones = down.shape[1], up.shape[0], (1,) * (down.ndim - 2)
    if not fits:
        raise AdapterFileError(
            f"{source}: {name} has a DoRA magnitude {list(magnitude.shape)}, but the weight has {inputs} inputs and "
            f"{outputs} outputs; get the file again."
        )
    shape = (1, inputs, *ones) if is_row else (outputs, 1, *ones)
    return "dora" if is_row else "dora_out", {**tensors, "magnitude": magnitude.reshape(shape)}


def _refuse_incomplete(groups: Mapping[str, Group], source: Path) -> None:
    mixed = [f"{name}: {' and '.join(sorted(group.kinds))}" for name, group in groups.items() if len(group.kinds) > 1]
    if mixed:
        raise UnsupportedError(f"{source} gives {len(mixed)} modules several kinds of adapter at once.", mixed[:_SHOWN])
    halves = [f"{name} lacks {' and '.join(group.lacking)}" for name, group in groups.items() if group.lacking]
    halves += [f"{name} has only {' and '.join(group.names)}" for name, group in groups.items() if not group.kinds]
    if halves:
        raise AdapterFileError(f"{source}: {len(halves)} modules are incomplete; get the file again.", halves[:_SHOWN])
    extra = [
        f"{name}: {'loha' if 'loha' in group.kinds else 'lokr'} with dora"
        for name, group in groups.items()
        if group.kinds != {"lora"} and {"magnitude", "magnitude_out"} & group.names.keys()
    ]
    if extra:
        raise UnsupportedError(
            f"{source}: {len(extra)} modules are of kinds that cannot be read; merge them into the base with the "
            "program that made them, or train again without DoRA.",
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
