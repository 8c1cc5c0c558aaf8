"""How tensors are called in adapter files, and how they become modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger, name_some, shown
from lora_diffusion.core.types import ModuleAdapter, ModuleKey
from lora_diffusion.formats._arrays import Array, widen
from lora_diffusion.formats._module import MAGNITUDES, SCALED, make_adapter, warn_of_limits
from lora_diffusion.formats._module import fits_magnitude as fits_magnitude

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
