"""An adapter file as its readers meet it: names taken apart, modules looked up in a base, nothing refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.soundness import change_rms, is_absurd
from lora_diffusion.core.types import ModuleAdapter, ModuleKey
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._arrays import Array, to_torch
from lora_diffusion.formats._client_names import (
    BEHIND_NORMS,
    NORM_OF,
    SUFFIXES,
    other_names,
    spelling_of,
    split_role,
    text_keys,
)
from lora_diffusion.formats._lora_config import find_alpha, find_rank
from lora_diffusion.formats._spelling import PEFT_PREFIX
from lora_diffusion.formats.diffusers import read_configs
from lora_diffusion.formats.peft import headers as read_headers
from lora_diffusion.formats.peft import part_folders, read_config, tensor_files

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap

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
    headers: Sequence[_safetensors.Header]
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
    arrays = _safetensors.load_unchecked(path)
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
    bad = _safetensors.non_finite(arrays)
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
        headers.append(_safetensors.read_header(file))
        arrays = _safetensors.load_unchecked(file)
        tensors = _in_torch(arrays)
        config = read_config(folder)
        grouped, own_strays = _group(tensors)
        part = folder.name if folder != path else _part_of(grouped, base)
        modules += _folder_modules(part, grouped, config, base)
        strays += own_strays
        names += tensors
        bad += _safetensors.non_finite(arrays)
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
