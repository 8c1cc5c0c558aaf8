"""The spelling that `load_lora_weights` of diffusers reads: `<part>.<path>.lora_A.weight` and `.lora_B.weight`.

Attention is spelled like all else. The older names that `save_lora_weights` gave it are read, but never written:
diffusers looks at the first name only, and drops all attention of a file that holds both spellings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.files import parse_json
from lora_diffusion.formats.capabilities import check_holds_state
from lora_diffusion.formats.metadata import without_hashes
from lora_diffusion.formats.normalize import complete_attention, with_attention
from lora_diffusion.formats.peft_config import (
    NOT_IN_PEFT,
    WRONG_AXIS,
    check_config,
    check_one_kind,
    find_alpha,
    peft_tensors,
    warn_of_ranks,
    write_config,
)
from lora_diffusion.formats.tensor_names import (
    PEFT_PREFIX,
    group_names,
    one_alpha,
    read_modules,
    split_embeddings,
    split_name,
)
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, in_float32

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

_CONFIG_KEY = "lora_adapter_metadata"


_REASON = "load_lora_weights has no layer for it"


class _Diffusers:
    name = naming = "diffusers"
    is_folder = False
    refused: Mapping[str, str] = {**NOT_IN_PEFT, "dora": WRONG_AXIS, "loha": _REASON, "lokr": _REASON}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a dotted path is followed by a suffix of adapters."""
        own = (split_name(name) for name in names if not name.startswith(PEFT_PREFIX))
        return any(found and found[1] and "." in found[0] for found in own)

    def portable(self, state: AdapterState) -> AdapterState:
        """Gives each attention of a text encoder all its matrices, and each text encoder some attention."""
        return with_attention(complete_attention(state))

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype | None) -> None:
        """Writes one file; ranks and alphas stand in its header.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
            UnsupportedError: diffusers cannot load a variant, or mixes of them in one part.
        """
        check_holds_state(self, state)
        tensors: dict[str, Array] = {}
        parts: dict[str, dict[str, ModuleAdapter]] = {}
        for key, adapter in state:
            name = key_map.name(key)
            own = peft_tensors(name, adapter, dtype)
            # transformers loads the text encoders, and wants the whole name.
            tensors |= {full + _whole(full) if key.part != "unet" else full: tensor for full, tensor in own.items()}
            parts.setdefault(key.part, {})[name.removeprefix(f"{key.part}.")] = adapter
        for part, adapters in parts.items():
            check_one_kind(part, adapters.values())
        configs = {
            f"{part}.{field}": value
            for part, adapters in sorted(parts.items())
            for field, value in write_config(adapters).items()
        }
        metadata = {**without_hashes(state.metadata), "format": "pt", _CONFIG_KEY: json.dumps(configs)}
        safetensors_file.save(tensors, metadata, path)

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file; without a record of alphas alpha = rank, as diffusers takes it."""
        return in_float32(self.read_stored(path, key_map))

    def read_stored(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file as `read` does, and keeps the numbers as arrays of their own type."""
        loaded, metadata = safetensors_file.load(path)
        tensors, embeddings = split_embeddings(loaded)
        configs = read_configs(metadata, path)
        metadata.pop(_CONFIG_KEY, None)
        metadata.pop("format", None)

        groups, _ = group_names(tensors)

        def alpha_of(name: str) -> float | None:
            beside = groups[name].names.get("alpha")
            if beside is not None:
                return one_alpha(tensors[beside], beside, path)
            key = key_map.key(name)
            return (
                find_alpha(configs[key.part], key_map.name(key).removeprefix(f"{key.part}."))
                if key.part in configs
                else None
            )

        modules = read_modules(tensors, key_map, alpha_of, path)
        for part, config in configs.items():
            own = {key_map.name(key).removeprefix(f"{part}."): own for key, own in modules.items() if key.part == part}
            warn_of_ranks(own, config, path)
        return AdapterState(modules, metadata, embeddings)  # type: ignore[arg-type]  # arrays


def _whole(name: str) -> str:
    return ".weight" if name.endswith(".lora_magnitude_vector") else ""


def read_configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Returns part -> the record of its ranks and alphas; empty if the file has none.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it describes another kind of adapter.
    """
    try:
        flat = parse_json(metadata.get(_CONFIG_KEY, "{}"))
        configs: dict[str, dict[str, Any]] = {}
        for dotted, value in flat.items():
            part, field = dotted.split(".", 1)
            configs.setdefault(part, {})[field] = value
    except (ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path}: its {_CONFIG_KEY} cannot be read ({error}).") from error
    for config in configs.values():
        check_config(config, path)
    return configs


FORMAT = _Diffusers()
