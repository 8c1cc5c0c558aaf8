"""An adapter file as its readers meet it: names taken apart, modules looked up in a base, nothing refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.soundness import change_rms, is_absurd
from lora_diffusion.core.types import ModuleAdapter, ModuleKey
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._arrays import Array, to_torch
from lora_diffusion.formats._lora_config import find_alpha, find_rank
from lora_diffusion.formats._spelling import PEFT_PREFIX
from lora_diffusion.formats.diffusers import read_configs
from lora_diffusion.formats.peft import headers as read_headers
from lora_diffusion.formats.peft import part_folders, read_config, tensor_files

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap

_SUFFIXES: Mapping[str, tuple[str, str]] = {
    **{f".lora_{role}.weight": (role, "kohya") for role in ("down", "up", "mid")},
    **{f".hada_{role}": (role, "loha") for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{role}": (role, "lokr") for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{role}": (role, "full") for role in ("diff", "diff_b")},
    **{f".{role}": (role, "norm") for role in ("w_norm", "b_norm")},
    **{f".{role}.weight": (role, "glora") for role in ("a1", "a2", "b1", "b2")},
    **{f".{role}": (role, "oft") for role in ("oft_blocks", "rescale")},
    ".on_input": ("on_input", "ia3"),
    ".lora_A.weight": ("down", "peft"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_magnitude_vector": ("magnitude", "peft"),
    ".lora_magnitude_vector.weight": ("magnitude", "peft"),
    ".lora.down.weight": ("down", "diffusers"),
    ".lora.up.weight": ("up", "diffusers"),
    ".lora_linear_layer.down.weight": ("down", "linear_layer"),
    ".lora_linear_layer.up.weight": ("up", "linear_layer"),
    ".down.weight": ("down", "processor"),
    ".up.weight": ("up", "processor"),
    ".alpha": ("alpha", ""),
    ".dora_scale": ("dora_scale", ""),
}
"""End of a tensor's name -> its role, and the style of naming (or the kind of adapter) that it belongs to."""
_NAMED = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")
"""PEFT's own names with the adapter's name in them, which it takes out before it saves."""
PAIRS = ("kohya", "peft", "peft-named", "diffusers", "linear_layer", "processor")
"""Styles of a pair of factors."""
_NEEDED = {
    "lora": ({"down", "up"},),
    "tucker": ({"down", "up"},),
    "loha": ({"w1_a", "w1_b", "w2_a", "w2_b"},),
    "lokr": ({"w1", "w2"}, {"w1_a", "w1_b", "w2"}, {"w1", "w2_a", "w2_b"}, {"w1_a", "w1_b", "w2_a", "w2_b"}),
    "full": ({"diff"}, {"diff_b"}),
    "norm": ({"w_norm"}, {"b_norm"}),
    "glora": ({"a1", "a2", "b1", "b2"},),
    "oft": ({"oft_blocks"},),
}
_CHANGE_ROLES = {
    variant: frozenset(role for role, style in _SUFFIXES.values() if style == name)
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
        keys = (names.key(name) for names in self.names if name in names)
        return next((key for key in keys if key in self.shapes), None)


@dataclass(frozen=True)
class FileModule:
    """All tensors of a file that begin with one module's name."""

    name: str
    key: ModuleKey | None
    """None where no spelling of the base knows the name."""
    spelling: str
    """How the name is made, see `_spelling_of`."""
    style: str
    """How the tensors of a pair are called, or the kind of adapter."""
    roles: Mapping[str, Tensor]
    recorded_alpha: float | None = None
    """What diffusers' or PEFT's record says, which is no tensor."""
    recorded_rank: int | None = None
    """The same of the rank."""

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
    grouped, strays = _group(tensors)
    modules = []
    for name, (style, roles) in grouped.items():
        key = base.find(name)
        config = configs.get(key.part) if key else None
        recorded = _recorded(config, name.removeprefix(f"{key.part}.")) if key and config else ()
        modules.append(FileModule(name, key, _spelling_of(name, key), style, roles, *recorded))
    return AdapterFile(path, modules, strays, list(tensors), [header], bad_numbers=_safetensors.non_finite(arrays))


def _in_torch(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: to_torch(array) for name, array in arrays.items()}


def _group(names: Mapping[str, Tensor]) -> tuple[dict[str, tuple[str, dict[str, Tensor]]], list[str]]:
    """Returns module name -> style and roles, and the tensors that have no place."""
    styles: dict[str, str] = {}
    roles: dict[str, dict[str, Tensor]] = {}
    strays = []
    for name, tensor in names.items():
        found = _split(name)
        if not found or found[1] in roles.get(found[0], {}):
            strays.append(name)
            continue
        module, role, style = found
        roles.setdefault(module, {})[role] = tensor
        if style and styles.setdefault(module, style) != style:
            strays.append(name)
            del roles[module][role]
    return {module: (styles.get(module, ""), own) for module, own in roles.items()}, strays


def _split(name: str) -> tuple[str, str, str] | None:
    """Returns module, role and style of a tensor's name."""
    named = _NAMED.search(name)
    if named and not name.endswith((".lora_A.weight", ".lora_B.weight")):
        return name[: named.start()], {"A": "down", "B": "up"}[named[1]], "peft-named"
    for suffix, (role, style) in _SUFFIXES.items():
        if name.endswith(suffix) and (style != "processor" or name.removesuffix(suffix).endswith("_lora")):
            return name.removesuffix(suffix), role, style
    return None


def _spelling_of(name: str, key: ModuleKey | None) -> str:
    """Returns how a name is made: the prefix, and where it matters "ldm", "attention", "processor" or "short".

    Short are the names of text encoders without `text_model`.
    """
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    if key is None or not prefix:
        return "unknown" if key is None else "processor" if ".processor." in name else "bare"
    if key.part != "unet":
        return prefix if "text_model" in name or "text_projection" in name else f"{prefix} short"
    if prefix == "lora_unet_":
        return prefix if name == prefix + key.path.replace(".", "_") else f"{prefix} ldm"
    if prefix == "unet.":
        return f"{prefix} processor" if ".processor." in name else prefix + (" attention" if _is_attention(key) else "")
    return prefix


_FLAT_PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
_DOTTED_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.", "diffusion_model.", "model.diffusion_model.")
_PREFIXES = (*_FLAT_PREFIXES, *_DOTTED_PREFIXES)


def _is_attention(key: ModuleKey) -> bool:
    return bool(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)$", key.path))


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
    part: str, grouped: Mapping[str, tuple[str, dict[str, Tensor]]], config: Mapping[str, Any], base: Base
) -> Iterator[FileModule]:
    for name, (style, roles) in grouped.items():
        path = name.removeprefix(PEFT_PREFIX)
        key = ModuleKey(part, path)
        is_there = name.startswith(PEFT_PREFIX) and key in base.shapes
        spelling = "in-model" if is_there else "unknown"
        yield FileModule(name, key if is_there else None, spelling, style, roles, *_recorded(config, path))


def _recorded(config: Mapping[str, Any], path: str) -> tuple[float, int]:
    return find_alpha(config, path), find_rank(config, path)


def _part_of(names: Iterable[str], base: Base) -> str:
    paths = {name.removeprefix(PEFT_PREFIX) for name in names}
    fitting = Counter(key.part for key in base.shapes if key.path in paths)
    return fitting.most_common(1)[0][0] if fitting else "unet"
