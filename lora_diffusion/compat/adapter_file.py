"""An adapter file as its readers meet it: names taken apart, modules looked up in a base, nothing refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.algebra.magnitude_limits import change_rms, is_absurd
from lora_diffusion.core.adapter_state import ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.diffusers import read_configs
from lora_diffusion.formats.peft import headers as read_headers
from lora_diffusion.formats.peft import part_folders, read_config, tensor_files
from lora_diffusion.formats.peft_config import find_alpha, find_rank
from lora_diffusion.formats.tensor_names import PEFT_PREFIX
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, to_torch

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap


SUFFIXES: Mapping[str, tuple[str, str]] = {
    **{f".lora_{role}.weight": (role, "kohya") for role in ("down", "up", "mid")},
    **{f".hada_{role}": (role, "loha") for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{role}": (role, "lokr") for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{role}": (role, "full") for role in ("diff", "diff_b")},
    **{f".{role}": (role, "norm") for role in ("w_norm", "b_norm")},
    **{f".{role}.weight": (role, "glora") for role in ("a1", "a2", "b1", "b2")},
    **{f".{role}": (role, "oft") for role in ("oft_blocks", "rescale")},
    ".on_input": ("on_input", "ia3"),
    ".set_weight": ("set_weight", "set"),
    ".lora_A.weight": ("down", "peft"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_magnitude_vector": ("magnitude", ""),
    ".lora_magnitude_vector.weight": ("magnitude", ""),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora_linear_layer.down.weight": ("down", "linear_layer"),
    ".lora_linear_layer.up.weight": ("up", "linear_layer"),
    ".down.weight": ("down", "processor"),
    ".up.weight": ("up", "processor"),
    ".lora_A": ("down", "bare"),
    ".lora_B": ("up", "bare"),
    ".alpha": ("alpha", ""),
    ".dora_scale": ("dora_scale", ""),
    ".reshape_weight": ("reshape", ""),
    ".scale": ("scale", ""),
    ".weight": ("weight", "ia3"),
}
"""End of a tensor's name -> its role, and the style of naming (or the kind of adapter) that it belongs to."""
_NAMED = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")
"""PEFT's own names with the adapter's name in them, which it takes out before it saves."""


def split_role(name: str) -> tuple[str, str, str] | None:
    """Returns module, role and style of a tensor's name."""
    named = _NAMED.search(name)
    if named and not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name[: named.start()], {"A": "down", "B": "up"}[named[1]], "peft-named"
    for suffix, (role, style) in SUFFIXES.items():
        stem = name.removesuffix(suffix)
        if stem == name or (style == "processor" and not stem.endswith("_lora")) or (style == "ia3" and "." in stem):
            continue
        return stem, role, style
    return None


_CLIPS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
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
    found = []
    if name.startswith("oft_unet_"):
        found.append(f"lora_unet_{name.removeprefix('oft_unet_')}")
    if ".processor.to_" in name and not name.endswith("_lora"):
        plain = name.replace(".processor.to_", ".to_")
        found.append(f"{plain}.0" if plain.endswith(".to_out") else plain)
    return found


def text_keys(name: str, family: str) -> list[ModuleKey]:
    """Returns the modules that ComfyUI's own name of one in a text encoder may mean, in old trees and in flat ones."""
    found = re.match(r"text_encoders\.(clip_[lhg])\.transformer\.(text_model\.)?", name)
    if not found or (found[1] == "clip_h") != (family == "sd2"):
        return []
    path = name[found.end() :]
    return [ModuleKey(_CLIPS[found[1]], f"{level}{path}") for level in ("text_model.", "")]


def _bare_spelling(name: str, key: ModuleKey) -> str:
    if key.part != "unet":
        return "bare text"
    return "processor" if ".processor." in name else "bare attention" if _is_attention(key) else "bare"


def spelling_of(name: str, key: ModuleKey | None) -> str:
    """Returns how a name is made: the prefix, and where it matters "ldm", "attention", "processor" or "short".

    Names without prefix are "bare", "bare attention", "processor" or "bare text".

    Short are the names of text encoders without `text_model`.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    if key is None or not prefix:
        return "unknown" if key is None else _bare_spelling(name, key)
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


PAIRS = ("kohya", "processor", "peft", "diffusers", "bare", "linear_layer", "peft-named")
"""Styles of a pair of factors, in the order in which ComfyUI looks for them."""
STYLES = (*PAIRS, "loha", "lokr", "glora", "oft", "ia3", "norm", "full", "set")
"""All kinds of tensors, in the order in which one of several at a module is taken for what it is."""
SHARED = frozenset({"alpha", "dora_scale", "magnitude", "reshape", "scale"})
"""Roles of tensors that belong to whatever kind is there."""
BUNDLED = "bundle_emb."
"""Beginning of the names of embeddings that a file brings along."""
_NEEDED = {
    "lora": ({"down", "up"},),
    "tucker": ({"down", "up"},),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "lokr": ({"w1", "w2"}, {"w1_a", "w1_b", "w2"}, {"w1", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    "full": ({"diff"}, {"diff_b"}),
    "norm": ({"w_norm"}, {"b_norm"}),
    "glora": ({"a1", "a2", "b1", "b2"},),
    "oft": ({"oft_blocks"},),
    "boft": ({"oft_blocks"},),
    "ia3": ({"weight", "on_input"},),
    "set": ({"set_weight"},),
}
_CHANGE_ROLES = {
    variant: frozenset(role for role, style in SUFFIXES.values() if style == name)
    for variant, name in (("lora", "kohya"), ("tucker", "kohya"), ("loha", "loha"), ("lokr", "lokr"))
}
"""Kind of adapter -> the roles of what makes its change of weight."""
_RANK_ROLES = ("down", "w1_b", "w2_b")


class Base(NamedTuple):
    """What of a base decides how an adapter is read."""

    family: str
    """sd1, sd2 or sdxl."""
    shapes: Mapping[ModuleKey, tuple[int, ...]]
    """Shape of the weight of each linear, convolution and norm layer."""
    names: Sequence[KeyMap]
    """All spellings of its modules."""

    def find(self, name: str) -> ModuleKey | None:
        """Returns the module that some spelling calls so, if this base has it."""
        known = [name, *other_names(name)]
        keys = (names.key(own) for own in known for names in self.names if own in names)
        found = next((key for key in keys if key in self.shapes), None)
        others = (key for key in (*text_keys(name, self.family), *self._norms(name)) if key in self.shapes)
        return found or next(others, None)

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
class FileModule:
    """All tensors of a file that begin with one module's name."""

    name: str
    key: ModuleKey | None
    """None where no spelling of the base knows the name."""
    spelling: str
    """How the name is made, see `spelling_of`."""
    style: str
    """How the tensors of a pair are called, or the kind of adapter; of several the first of `STYLES`."""
    roles: Mapping[str, Tensor]
    """Of this kind, and those that any kind may have."""
    recorded_alpha: float | None = None
    """What diffusers' or PEFT's record says, which is no tensor."""
    recorded_rank: int | None = None
    """The same of the rank."""
    beside: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Other kinds at the same module, by style."""
    makes_magnitude: bool = False
    """Whether the record beside the tensors, or those of other modules, make the program give it a magnitude."""

    @property
    def kinds(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors of every kind at this module, by style, without those that any kind may have."""
        own = {role: tensor for role, tensor in self.roles.items() if role not in SHARED}
        return ({self.style: own} if own else {}) | dict(self.beside)

    def as_style(self, style: str) -> FileModule:
        """Returns the module with another of its kinds in front."""
        kinds = self.kinds
        shared = {role: tensor for role, tensor in self.roles.items() if role in SHARED}
        roles = {**kinds.pop(style, {}), **shared}
        return replace(self, style=style, roles=roles, beside=kinds)

    @property
    def variant(self) -> str:
        """The kind of adapter."""
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
        return any(needed <= self.roles.keys() for needed in _NEEDED.get(self.variant, (set(),)))

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
    def is_absurd(self) -> bool:
        """Says whether its change of weight drowns the base; no, where its tensors tell no change."""
        roles = {role: self.roles[role] for role in _CHANGE_ROLES.get(self.variant, ()) if role in self.roles}
        adapter = ModuleAdapter(self.variant.replace("tucker", "lora"), roles, self.scale * self.rank)
        if not all(tensor.numel() for tensor in roles.values()):
            return False
        try:
            return bool(roles) and self.is_whole and is_absurd(change_rms(adapter))
        except AdapterFileError:
            return False

    @property
    def scale(self) -> float:
        """What the product of the factors is to be multiplied with: alpha / rank, 1 without an alpha."""
        alpha = self.recorded_alpha if self.alpha is None else self.alpha
        return 1.0 if alpha is None or not self.rank else alpha / self.rank


@dataclass(frozen=True)
class AdapterFile:
    """A whole file or PEFT folder."""

    path: Path
    modules: Sequence[FileModule]
    strays: Sequence[str]
    """Tensors whose names end in no known way, or that say again what another says."""
    embeddings: Sequence[str] = field(default=(), kw_only=True)
    """Tensors of embeddings that the file brings along."""
    names: Sequence[str]
    """Of all tensors, in the order in which the safetensors library gives them."""
    headers: Sequence[safetensors_file.Header]
    is_folder: bool = False
    bad_numbers: Sequence[str] = field(default=())
    """Tensors with NaN or infinity."""

    @cached_property
    def absurd(self) -> frozenset[str]:
        """Returns the modules whose change of weight drowns the base."""
        return frozenset(module.name for module in self.modules if module.is_absurd)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Returns the metadata of the file; those of a folder's files are not read by anyone."""
        return {} if self.is_folder else self.headers[0].metadata


def read_file(path: Path, base: Base) -> AdapterFile:
    """Reads an adapter file or PEFT folder.

    Raises:
        AdapterFileError: it cannot be read at all.
    """
    if path.is_dir():
        return _read_folder(path, base)
    (header,) = read_headers(path)
    arrays = safetensors_file.load_unchecked(path)
    if not arrays:
        raise AdapterFileError(f"{path} holds no tensors; get the file again.")
    tensors = _in_torch(arrays)
    configs = read_configs(header.metadata, path)
    embeddings = [name for name in tensors if name.startswith(BUNDLED)]
    grouped, strays = _group({name: tensor for name, tensor in tensors.items() if name not in embeddings})
    modules = []
    turned = {name.partition(".")[0] for name in tensors if "lora_magnitude_vector" in name}
    for name, kinds in grouped.items():
        key = base.find(name)
        config = configs.get(key.part) if key else None
        recorded = _recorded(config, name.removeprefix(f"{key.part}.")) if key and config else (None, None)
        module = _module(name, key, spelling_of(name, key), kinds, *recorded)
        modules.append(replace(module, makes_magnitude=name.partition(".")[0] in turned))
    bad = safetensors_file.non_finite(arrays)
    return AdapterFile(path, modules, strays, list(tensors), [header], bad_numbers=bad, embeddings=embeddings)


def _module(
    name: str, key: ModuleKey | None, spelling: str, kinds: Mapping[str, Mapping[str, Tensor]], alpha: float | None,
    rank: int | None,
) -> FileModule:  # fmt: skip
    own = {style: roles for style, roles in kinds.items() if style}
    style = min(own, key=STYLES.index, default="")
    roles = {**own.pop(style, {}), **kinds.get("", {})}
    return FileModule(name, key, spelling, style, roles, alpha, rank, own)


def _in_torch(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: to_torch(array) for name, array in arrays.items()}


def _group(names: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, dict[str, Tensor]]], list[str]]:
    """Returns module name -> style -> roles, "" for roles of any kind, and the tensors that have no place."""
    kinds: dict[str, dict[str, dict[str, Tensor]]] = {}
    strays = []
    for name, tensor in names.items():
        found = split_role(name)
        if not found or found[1] in kinds.get(found[0], {}).get(found[2], {}):
            strays.append(name)
            continue
        module, role, style = found
        kinds.setdefault(module, {}).setdefault(style, {})[role] = tensor
    return kinds, strays


def _read_folder(path: Path, base: Base) -> AdapterFile:
    modules: list[FileModule] = []
    strays: list[str] = []
    names: list[str] = []
    headers, bad = [], []
    for folder, file in zip(part_folders(path), tensor_files(path), strict=True):
        headers.append(safetensors_file.read_header(file))
        arrays = safetensors_file.load_unchecked(file)
        tensors = _in_torch(arrays)
        config = read_config(folder)
        grouped, own_strays = _group(tensors)
        part = folder.name if folder != path else _part_of(grouped, base)
        modules += _folder_modules(part, grouped, config, base)
        strays += own_strays
        names += tensors
        bad += safetensors_file.non_finite(arrays)
    return AdapterFile(path, modules, strays, names, headers, is_folder=True, bad_numbers=bad)


def _folder_modules(
    part: str, grouped: Mapping[str, Mapping[str, Mapping[str, Tensor]]], config: Mapping[str, Any], base: Base
) -> Iterator[FileModule]:
    for name, kinds in grouped.items():
        path = name.removeprefix(PEFT_PREFIX)
        key = ModuleKey(part, path)
        is_there = name.startswith(PEFT_PREFIX) and key in base.shapes
        spelling = ("in-model" if _is_target(config, path) else "untargeted") if is_there else "unknown"
        module = _module(name, key if is_there else None, spelling, kinds, *_recorded(config, path))
        yield replace(module, makes_magnitude=bool(config.get("use_dora")))


def _is_target(config: Mapping[str, Any], path: str) -> bool:
    """Says whether PEFT makes a layer for a path: one that ends so, or that an expression names as a whole."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, path))
    return not targets or any(path == own or path.endswith(f".{own}") for own in targets)


def _recorded(config: Mapping[str, Any], path: str) -> tuple[float, int]:
    return find_alpha(config, path), find_rank(config, path)


def _part_of(names: Iterable[str], base: Base) -> str:
    paths = {name.removeprefix(PEFT_PREFIX) for name in names}
    fitting = Counter(key.part for key in base.shapes if key.path in paths)
    return fitting.most_common(1)[0][0] if fitting else "unet"
