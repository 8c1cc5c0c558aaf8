"""How files name the modules of the Stable Diffusion families (data, and one function over it)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from lora_diffusion.architectures import ldm_names, modules
from lora_diffusion.architectures.base import DiffusionArchitecture, TextEncoder
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.keymap import KeyMap, naming

if TYPE_CHECKING:
    from torch import nn

_TEXT = "text_model."
_NORM = re.compile(r"(.*\.)?(norm[123]?|conv_norm_out)")
_LDM_PATHS = re.compile(
    r"((down|up)_blocks\.\d+\.|mid_block\.(resnets\.[01]|attentions\.0)\.|(time|add)_embedding\.linear_).*|conv_(in|norm_out|out)"
)


def key_map(format_name: str, parts: Mapping[str, nn.Module] | None, architecture: DiffusionArchitecture) -> KeyMap:
    """Maps every linear, convolution, norm and embedding layer of the parts to its name in a file.

    transformers 5.6 flattened CLIPTextModel: its paths begin with "encoder.", while files of every app say
    "text_model.encoder.". PEFT folders are loaded on the live model and keep the live path.

    Args:
        format_name: kohya, diffusers or peft; ldm is that of base checkpoints, see `_ldm_pairs`; norms gives what
            LyCORIS calls the norm layers of the UNet's blocks.
        parts: part -> network; the meta device is enough. Of a part that is not there, and of all with None, all
            modules are mapped that a base of the architecture may have.
        architecture: decides prefixes and block names.

    Raises:
        UnsupportedError: the format has no names for such bases.
    """
    return _key_map(format_name, parts, architecture) if parts else _possible(format_name, architecture)


@cache
def _possible(format_name: str, architecture: DiffusionArchitecture) -> KeyMap:
    return _key_map(format_name, {}, architecture)


def _key_map(format_name: str, parts: Mapping[str, nn.Module], architecture: DiffusionArchitecture) -> KeyMap:
    live = _layers(parts) if parts else {}  # without networks, names need no torch
    paths = {**modules.possible_paths(architecture), **live}
    numbered = [path for path in paths["unet"] if "unet" in live or modules.decides_numbers(architecture, path)]
    if format_name == "ldm":
        pairs = _ldm_pairs({**paths, "unet": numbered}, architecture)
        return KeyMap(pairs, ((key, other) for key, name in pairs for other in ldm_names.other_names(key, name)))
    if format_name == "norms":
        paths, format_name = {"unet": [path for path in paths["unet"] if _NORM.fullmatch(path)]}, "kohya"
    if format_name not in _NAMES:
        format_name = naming(format_name)
    if format_name not in _NAMES:
        known = ", ".join(_NAMES)
        raise UnsupportedError(f"Stable Diffusion adapters have no format {format_name!r}; known: {known}.")
    ldm = ldm_names.unet_names([path for path in numbered if _LDM_PATHS.fullmatch(path)])
    encoders = {encoder.part: encoder for encoder in architecture.text_encoders}
    names_of = _NAMES[format_name]
    names = {
        ModuleKey(part, path): list(
            dict.fromkeys(names_of(_Module(architecture, encoders.get(part), path, ldm.get(path))))
        )
        for part, values in paths.items()
        for path in values
    }
    return KeyMap(
        ((key, values[0]) for key, values in names.items()),
        ((key, name) for key, values in names.items() for name in values[1:]),
    )


class _Module(NamedTuple):
    architecture: DiffusionArchitecture
    encoder: TextEncoder | None
    """None for the UNet."""
    path: str
    ldm: str | None
    """Its path in a UNet of LDM, if there is one."""


def _layers(parts: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    from torch import nn

    types = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding
    return {
        part: [path for path, module in network.named_modules() if isinstance(module, types)]
        for part, network in parts.items()
    }


def _ldm_pairs(paths: Mapping[str, list[str]], architecture: DiffusionArchitecture) -> list[tuple[ModuleKey, str]]:
    pairs = [
        (ModuleKey("unet", path), ldm_names.UNET + name) for path, name in ldm_names.unet_names(paths["unet"]).items()
    ]
    for encoder in architecture.text_encoders:
        name = ldm_names.text_encoder_names(encoder)
        pairs += [(ModuleKey(encoder.part, path), name(path)) for path in paths[encoder.part]]
    return pairs


def _kohya(module: _Module) -> Iterable[str]:
    if module.encoder is None:
        paths = [module.path] if module.ldm is None else [module.path, module.ldm]
        written_first = reversed(paths) if module.architecture.has_ldm_names_in_kohya else paths
        names = [*(f"lora_unet_{path}" for path in written_first), f"lycoris_{module.path}"]
    else:
        names = [prefix + path for path in _text_paths(module.path) for prefix in module.encoder.kohya_prefixes]
    return (name.replace(".", "_") for name in names)


def _diffusers(module: _Module) -> Iterable[str]:
    if module.encoder:
        plain = [f"{module.encoder.part}.{path}" for path in _text_paths(module.path)]
        plain.append(f"text_encoders.{module.encoder.comfyui_name}.transformer.{_text_paths(module.path)[0]}")
        return [*plain, *(re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1_lora", name) for name in plain)]
    # What diffusers 0.12 to 0.20 saved: <block>.processor.to_q_lora.up.weight.
    processor = re.sub(r"(attn[12])\.to_(q|k|v|out)(\.0)?$", r"\1.processor.to_\2_lora", module.path)
    generic = [f"diffusion_model.{module.ldm}", ldm_names.UNET + module.ldm] if module.ldm else []
    return [*(prefix + path for path in (module.path, processor) for prefix in ("unet.", "")), *generic]


def _peft(module: _Module) -> Iterable[str]:
    part = module.encoder.part if module.encoder else "unet"
    return [f"{part}.{path}" for path in (module.path, *_text_paths(module.path))]


def _text_paths(path: str) -> list[str]:
    """Returns a path of a text encoder with `text_model`, as files have it, and without."""
    bare = path.removeprefix(_TEXT)
    return [path] if bare == "text_projection" else [_TEXT + bare, bare]


_NAMES: Mapping[str, Callable[[_Module], Iterable[str]]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "peft": _peft,
}
"""Format -> the name that is written, and then those that are also read."""
