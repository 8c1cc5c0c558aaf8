"""How tensors are called in adapter files, and how they become modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.types import ModuleAdapter, ModuleKey

if TYPE_CHECKING:
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap

KOHYA = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
PEFT = {".lora_A.weight": "down", ".lora_B.weight": "up"}
DIFFUSERS = {
    **PEFT,
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
}
"""The spelling of PEFT, and those that save_lora_weights of diffusers used for attention."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before every name in its own files."""

_OTHER_VARIANTS = {
    "dora_scale": "dora",
    "lora_magnitude_vector": "dora",
    "hada_": "loha",
    "lokr_": "lokr",
    "lora_mid": "locon with Tucker decomposition",
    "oft_": "oft",
    ".diff": "full difference",
}
_SHOWN = 10

Roles = dict[str, dict[str, str]]
"""Module name -> role (down, up, alpha) -> tensor name."""


def sort_names(names: Iterable[str], suffixes: Mapping[str, str]) -> tuple[Roles, list[str]]:
    """Returns the roles of each module, and the names that end in no known suffix or repeat a role."""
    modules: Roles = {}
    strange = []
    for name in names:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), "")
        roles = modules.setdefault(name.removesuffix(suffix), {}) if suffix else {}
        if not suffix or suffixes[suffix] in roles:
            strange.append(name)
        else:
            roles[suffixes[suffix]] = name
    return modules, strange


def variant_of(name: str) -> str | None:
    """Returns the kind of adapter, other than lora, that a tensor name gives away."""
    return next((variant for mark, variant in _OTHER_VARIANTS.items() if mark in name), None)


def read_modules(
    tensors: Mapping[str, Tensor],
    suffixes: Mapping[str, str],
    key_map: KeyMap,
    find_alpha: Callable[[str], float | None],
    source: Path,
) -> dict[ModuleKey, ModuleAdapter]:
    """Turns the tensors of a file into modules.

    Args:
        tensors: name -> CPU tensor.
        suffixes: suffix -> role.
        key_map: knows the module names.
        find_alpha: module name -> alpha; None means that it equals the rank.
        source: the file, for messages.

    Returns:
        modules with float32 tensors.

    Raises:
        AdapterFileError: a name without meaning, half a pair, an unknown module, or factors that do not fit.
        UnsupportedError: another kind of adapter.
    """
    modules, strange = sort_names(tensors, suffixes)
    _refuse_strange(strange, source)
    halves = [
        f"{name} lacks {' and '.join(lacking)}"
        for name, roles in modules.items()
        if (lacking := sorted({"down", "up"} - roles.keys()))
    ]
    if halves:
        raise AdapterFileError(f"{source}: {len(halves)} modules are incomplete; get the file again.", halves[:_SHOWN])
    key_map.require(modules, str(source))
    adapters = {}
    for name, roles in modules.items():
        down, up = tensors[roles["down"]].float(), tensors[roles["up"]].float()
        if down.dim() < 2 or up.dim() < 2 or up.shape[1] != down.shape[0]:
            raise AdapterFileError(
                f"{source}: {name} has factors {list(up.shape)} and {list(down.shape)} that do not fit."
            )
        alpha = find_alpha(name)
        rank = float(down.shape[0])
        adapters[key_map.key(name)] = ModuleAdapter("lora", {"down": down, "up": up}, rank if alpha is None else alpha)
    if not adapters:
        raise AdapterFileError(f"{source} holds no adapter.")
    return adapters


def _refuse_strange(strange: list[str], source: Path) -> None:
    if not strange:
        return
    variant = variant_of(strange[0])
    if variant:
        raise UnsupportedError(f"{source} holds a {variant} adapter ({strange[0]}); only lora can be read.")
    raise AdapterFileError(
        f"{source}: {len(strange)} of its tensors have names that this format does not use, or name a module twice. "
        "See 'lora-diffusion inspect'.",
        strange[:_SHOWN],
    )
