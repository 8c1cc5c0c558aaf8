"""A parsed adapter file matched to a base, as programs meet it: modules looked up, nothing refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.algebra.magnitude_limits import change_rms, is_implausible
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.parsed_file import ParsedFile, ParsedPart
from lora_diffusion.formats.peft_config import recorded_alpha, recorded_rank
from lora_diffusion.formats.tensor_names import COMPLETE, EMBEDDING, LIVE, PEFT_PREFIX, SUFFIXES
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import to_torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.architectures.base import DiffusionArchitecture
    from lora_diffusion.core.keymap import KeyMap


BEHIND_NORMS = {
    "norm1": "attn1.to_q",
    "norm2": "attn2.to_q",
    "norm3": "ff.net.0.proj",
    "norm": "proj_in",
    "in_layers.0": "in_layers.2",
    "out_layers.0": "out_layers.3",
}
"""Norm layer in ComfyUI's own names -> the layer behind it in the same block."""
NORM_OF = {
    "attn1.to_q": "norm1",
    "attn2.to_q": "norm2",
    "ff.net.0.proj": "norm3",
    "proj_in": "norm",
    "conv1": "norm1",
    "conv2": "norm2",
}
"""The same in diffusers' names, the other way around."""


def other_names(name: str) -> list[str]:
    """Returns names that other programs give to the same module: of attention of 2023, and of kohya's own OFT."""
    names = []
    if name.startswith("oft_unet_"):
        names.append(f"lora_unet_{name.removeprefix('oft_unet_')}")
    if ".processor.to_" in name and not name.endswith("_lora"):
        plain = name.replace(".processor.to_", ".to_")
        names.append(f"{plain}.0" if plain.endswith(".to_out") else plain)
    return names


def text_keys(name: str, architecture: DiffusionArchitecture) -> list[ModuleKey]:
    """Returns the modules that ComfyUI's own name of one in a text encoder may mean, in old trees and in flat ones."""
    match = re.match(r"text_encoders\.(\w+)\.transformer\.(text_model\.)?", name)
    parts = [encoder.part for encoder in architecture.text_encoders if match and encoder.comfyui_name == match[1]]
    return [ModuleKey(part, level + name[match.end() :]) for part in parts for level in ("text_model.", "") if match]


def _bare_naming(name: str, key: ModuleKey) -> str:
    if key.part != "unet":
        return "bare text"
    return "processor" if ".processor." in name else "bare attention" if _is_attention(key) else "bare"


def naming_of(name: str, key: ModuleKey | None) -> str:
    """Returns how a name is made: the prefix, and where it matters "ldm", "attention", "processor" or "short".

    Names without prefix are "bare", "bare attention", "processor" or "bare text".

    Short are the names of text encoders without `text_model`.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    if key is None or not prefix:
        return "unknown" if key is None else _bare_naming(name, key)
    if key.part != "unet":
        if prefix == "text_encoder_2." and name.endswith("text_projection"):
            return f"{prefix} projection"
        return prefix if "text_model" in name or "text_projection" in name else f"{prefix} short"
    if prefix == "lora_unet_":
        return prefix if name == prefix + key.path.replace(".", "_") else f"{prefix} ldm"
    if prefix == "unet.":
        return f"{prefix} processor" if ".processor." in name else prefix + (" attention" if _is_attention(key) else "")
    return prefix


_FLAT_PREFIXES = ("lora_unet_", "oft_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
_DOTTED_PREFIXES = (
    "unet.",
    "text_encoders.",
    "text_encoder.",
    "text_encoder_2.",
    "diffusion_model.",
    "model.diffusion_model.",
)
_PREFIXES = (*_FLAT_PREFIXES, *_DOTTED_PREFIXES)


def _is_attention(key: ModuleKey) -> bool:
    return bool(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)$", key.path))


PAIRS = ("kohya", "processor", "peft", "diffusers", "bare", "linear_layer", LIVE)
"""Styles of a pair of factors, in the order in which ComfyUI looks for them."""
STYLES = (*PAIRS, "loha", "lokr", "glora", "oft", "ia3", "norm", "full", "set")
"""All namings of pairs and other variants, in the order in which one of several at a module is taken for what it is."""
SHARED = frozenset(row.role for row in SUFFIXES if row.style == "")
"""Roles of tensors that belong to whatever variant is there."""
_ROLES = {(row.variant, row.tensor): row.role for row in SUFFIXES if row.variant}
_NEEDED: Mapping[str, Sequence[Set[str]]] = {
    **{variant: [{_ROLES[variant, name] for name in names} for names in sets] for variant, sets in COMPLETE.items()},
    "full": ({"diff"}, {"diff_b"}),
    "norm": ({"w_norm"}, {"b_norm"}),
}
"""Variant -> the sets of roles of which one makes a change."""
_CHANGE_ROLES = {
    variant: [row.role for row in SUFFIXES if row.variant == variant] for variant in ("lora", "loha", "lokr")
}
"""Variant -> the roles of what makes its change of weight."""
_PLAIN = {"tucker": "lora", "boft": "oft"}
"""Variant as programs tell it -> the one whose tensors it has."""
_RANK_ROLES = ("down", "w1_b", "w2_b")


class Base(NamedTuple):
    """What of a base decides how an adapter is read."""

    architecture: DiffusionArchitecture
    shapes: Mapping[ModuleKey, tuple[int, ...]]
    """Shape of the weight of each linear, convolution and norm layer."""
    names: Sequence[KeyMap]
    """Of its modules, in every format."""

    def find(self, name: str) -> ModuleKey | None:
        """Returns the module that some format calls so, if this base has it."""
        known = [name, *other_names(name)]
        keys = (names.key(alias) for alias in known for names in self.names if alias in names)
        key = next((key for key in keys if key in self.shapes), None)
        others = (key for key in (*text_keys(name, self.architecture), *self._norms(name)) if key in self.shapes)
        return key or next(others, None)

    def _norms(self, name: str) -> list[ModuleKey]:
        """Returns the norm layer of the UNet that ComfyUI's own name means, found by the layer behind it."""
        if name == "diffusion_model.out.0":
            return [ModuleKey("unet", "conv_norm_out")]
        for norm, behind in BEHIND_NORMS.items():
            other = f"{name.removesuffix(norm)}{behind}"
            known = next((names for names in self.names if other in names), None)
            if name.startswith("diffusion_model.") and name.endswith(f".{norm}") and known:
                path = known.key(other).path
                layer = next(layer for layer in NORM_OF if path.endswith(layer))
                return [ModuleKey("unet", path.removesuffix(layer) + NORM_OF[layer])]
        return []

    def has_bias(self, key: ModuleKey) -> bool:
        """Says whether a layer has a bias, which queries, keys and values of a UNet lack, and projections of text."""
        return not re.search(r"attn[12]\.to_[qkv]$|text_projection$|_embedding$", key.path)


@dataclass(frozen=True)
class MatchedModule:
    """All tensors of a file that begin with one module's name."""

    name: str
    key: ModuleKey | None
    """None where no format of the base knows the name."""
    naming: str
    """How the name is made, see `naming_of`."""
    style: str
    """How the tensors of a pair are called, or its variant; of several the first of `STYLES`."""
    roles: Mapping[str, Tensor]
    """Of this style, and those that any may have."""
    recorded_alpha: float | None = None
    """What diffusers' or PEFT's record says, which is no tensor."""
    recorded_rank: int | None = None
    """The same of the rank."""
    beside: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Other styles at the same module."""
    makes_magnitude: bool = False
    """Whether the record beside the tensors, or those of other modules, make the program give it a magnitude."""

    @property
    def styles(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of every style at this module, in any shape, without those that any may have."""
        roles = {role: tensor for role, tensor in self.roles.items() if role not in SHARED}
        return ({self.style: roles} if roles else {}) | dict(self.beside)

    def as_style(self, style: str) -> MatchedModule:
        """Returns the module with another of its styles in front."""
        styles = self.styles
        shared = {role: tensor for role, tensor in self.roles.items() if role in SHARED}
        roles = {**styles.pop(style, {}), **shared}
        return replace(self, style=style, roles=roles, beside=styles)

    @property
    def variant(self) -> str:
        """What programs take it for."""
        if self.style in PAIRS:
            return "tucker" if "mid" in self.roles else "lora"
        blocks = self.roles.get("oft_blocks")
        return "boft" if blocks is not None and blocks.dim() == 4 else self.style or "nothing"

    @property
    def is_dora(self) -> bool:
        """Says whether it has a magnitude."""
        return "dora_scale" in self.roles or "magnitude" in self.roles

    @property
    def is_whole(self) -> bool:
        """Says whether the tensors that make a change are all there."""
        variant = _PLAIN.get(self.variant, self.variant)
        return any(needed <= self.roles.keys() for needed in _NEEDED.get(variant, (set(),)))

    @property
    def rank(self) -> int:
        """Inner size, 0 where there is none, as in a LoKr of two full factors."""
        sizes = [self.roles[role].shape[0] for role in _RANK_ROLES if role in self.roles and self.roles[role].dim()]
        return int(sizes[0]) if sizes else 0

    @property
    def alpha(self) -> float | None:
        """The alpha that stands beside its tensors."""
        alpha = self.roles.get("alpha")
        return float(alpha.float().flatten()[0]) if alpha is not None and alpha.numel() else None

    @property
    def is_implausible(self) -> bool:
        """Says whether its change of weight overwhelms the base; no, where its tensors tell no change."""
        variant = _PLAIN.get(self.variant, self.variant)
        roles = {role: self.roles[role] for role in dict.fromkeys(_CHANGE_ROLES.get(variant, ())) if role in self.roles}
        adapter = ModuleAdapter(variant, roles, self.scale * self.rank)
        if not all(tensor.numel() for tensor in roles.values()):
            return False
        try:
            return bool(roles) and self.is_whole and is_implausible(change_rms(adapter))
        except AdapterFileError:
            return False

    @property
    def scale(self) -> float:
        """What the product of the factors is to be multiplied with: alpha / rank, 1 without an alpha."""
        alpha = self.recorded_alpha if self.alpha is None else self.alpha
        return 1.0 if alpha is None or not self.rank else alpha / self.rank


@dataclass(frozen=True)
class MatchedFile:
    """A whole file or PEFT folder, as it meets a base."""

    parsed: ParsedFile
    base: Base
    modules: Sequence[MatchedModule]
    unmatched: Sequence[str]
    """Tensors whose names end in no known way, or that say again what another says."""
    names: Sequence[str]
    """Of all tensors, in the order in which the safetensors library gives them."""
    embeddings: Sequence[str] = ()
    """Tensors of embeddings that the file brings along."""
    bad_numbers: Sequence[str] = ()
    """Tensors with NaN or infinity."""

    @cached_property
    def implausible(self) -> frozenset[str]:
        """Returns the modules whose change of weight overwhelms the base."""
        return frozenset(module.name for module in self.modules if module.is_implausible)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Returns the metadata of the file; those of a folder's files are not read by anyone."""
        return {} if self.parsed.is_folder else self.parsed.metadata


def match_file(file: ParsedFile, base: Base) -> MatchedFile:
    """Looks the modules of an adapter file or PEFT folder up in a base.

    Raises:
        AdapterFileError: it cannot be read at all.
    """
    file.check_record()
    if file.is_folder:
        return _match_folder(file, base)
    (part,) = file.parts
    if not part.unchecked:
        raise AdapterFileError(f"{file.path} holds no tensors; get the file again.")
    record = file.diffusers_record
    styles, unmatched = _by_style(part)
    modules = []
    turned = {name.partition(".")[0] for name in part.unchecked if "lora_magnitude_vector" in name}
    for name, roles in styles.items():
        key = base.find(name)
        config = record.get(key.part) if key else None
        recorded = _recorded(config, name.removeprefix(f"{key.part}.")) if key and config else (None, None)
        module = _module(name, key, naming_of(name, key), roles, recorded)
        modules.append(replace(module, makes_magnitude=name.partition(".")[0] in turned))
    embeddings = [name for name in part.unchecked if name.startswith(EMBEDDING)]
    bad = safetensors_file.non_finite(part.unchecked)
    return MatchedFile(file, base, modules, unmatched, list(part.unchecked), embeddings, bad)


def _module(
    name: str,
    key: ModuleKey | None,
    naming: str,
    styles: Mapping[str, Mapping[str, Tensor]],
    recorded: tuple[float | None, int | None],
) -> MatchedModule:
    others = {style: roles for style, roles in styles.items() if style}
    style = min(others, key=STYLES.index, default="")
    roles = {**others.pop(style, {}), **styles.get("", {})}
    return MatchedModule(name, key, naming, style, roles, *recorded, others)


def _by_style(part: ParsedPart) -> tuple[dict[str, dict[str, dict[str, Tensor]]], list[str]]:
    """Returns module name -> style -> roles, "" for roles of any variant, and the tensors that have no place."""
    modules: dict[str, dict[str, dict[str, Tensor]]] = {}
    unmatched = []
    for name, module, row in part.tensors:
        if not part.is_in_folder and name.startswith(EMBEDDING):
            continue
        is_known = row is not None and row.style is not None and (row.style != "ia3" or "." not in module)
        if row is None or row.style is None or not is_known or row.role in modules.get(module, {}).get(row.style, {}):
            unmatched.append(name)
            continue
        modules.setdefault(module, {}).setdefault(row.style, {})[row.role] = to_torch(part.unchecked[name])
    return modules, unmatched


def _match_folder(file: ParsedFile, base: Base) -> MatchedFile:
    modules: list[MatchedModule] = []
    unmatched: list[str] = []
    names: list[str] = []
    bad: list[str] = []
    for part in file.parts:
        styles, left_over = _by_style(part)
        names += part.unchecked
        config = part.config
        modules += _folder_modules(part.part or _part_of(styles, base), styles, config, base)
        unmatched += left_over
        bad += safetensors_file.non_finite(part.unchecked)
    return MatchedFile(file, base, modules, unmatched, names, (), bad)


def _folder_modules(
    part: str, styles: Mapping[str, Mapping[str, Mapping[str, Tensor]]], config: Mapping[str, Any], base: Base
) -> Iterator[MatchedModule]:
    for name, roles in styles.items():
        path = name.removeprefix(PEFT_PREFIX)
        key = ModuleKey(part, path)
        is_there = name.startswith(PEFT_PREFIX) and key in base.shapes
        naming = ("in-model" if _is_target(config, path) else "untargeted") if is_there else "unknown"
        module = _module(name, key if is_there else None, naming, roles, _recorded(config, path))
        yield replace(module, makes_magnitude=bool(config.get("use_dora")))


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """Says whether PEFT makes a layer for a path: one that ends so, or that an expression names as a whole."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, path))
    return not targets or any(path == target or path.endswith(f".{target}") for target in targets)


def _recorded(config: Mapping[str, Any], path: str) -> tuple[float, int]:
    return recorded_alpha(config, path), recorded_rank(config, path)


def _part_of(names: Iterable[str], base: Base) -> str:
    paths = {name.removeprefix(PEFT_PREFIX) for name in names}
    fitting = Counter(key.part for key in base.shapes if key.path in paths)
    return fitting.most_common(1)[0][0] if fitting else "unet"
