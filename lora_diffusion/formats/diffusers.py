"""The spelling that `load_lora_weights` of diffusers reads: `<part>.<path>.lora_A.weight` and `.lora_B.weight`.

Attention is spelled like all else. The older names that `save_lora_weights` gives it are read, but never written:
diffusers looks at the first name only, and drops all attention of a file that holds both spellings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.types import AdapterState, ModuleAdapter
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._lora_config import check_config, find_alpha, write_config
from lora_diffusion.formats._spelling import DIFFUSERS, PEFT_PREFIX, read_modules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap

_CONFIG_KEY = "lora_adapter_metadata"


class _Diffusers:
    name = "diffusers"
    is_folder = False

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a dotted path is followed by a suffix of diffusers."""
        own = [name for name in names if not name.startswith(PEFT_PREFIX)]
        return any(name.endswith(tuple(DIFFUSERS)) for name in own)

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype) -> None:
        """Writes one file; ranks and alphas stand in its header.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
        """
        tensors: dict[str, Tensor] = {}
        parts: dict[str, dict[str, ModuleAdapter]] = {}
        for key, adapter in state:
            name = key_map.name(key)
            tensors[f"{name}.lora_A.weight"] = _safetensors.cast(name, adapter.tensors["down"], dtype)
            tensors[f"{name}.lora_B.weight"] = _safetensors.cast(name, adapter.tensors["up"], dtype)
            parts.setdefault(key.part, {})[name.removeprefix(f"{key.part}.")] = adapter
        configs = {
            f"{part}.{field}": value
            for part, adapters in parts.items()
            for field, value in write_config(adapters).items()
        }
        metadata = {**state.metadata, "format": "pt", _CONFIG_KEY: json.dumps(configs)}
        _safetensors.save(tensors, metadata, path)

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file; without a record of alphas alpha = rank, as diffusers takes it."""
        tensors, metadata = _safetensors.load(path)
        configs = read_configs(metadata, path)
        metadata.pop(_CONFIG_KEY, None)
        metadata.pop("format", None)

        def alpha_of(name: str) -> float | None:
            part = key_map.key(name).part
            return find_alpha(configs[part], name.removeprefix(f"{part}.")) if part in configs else None

        return AdapterState(read_modules(tensors, DIFFUSERS, key_map, alpha_of, path), metadata)


def read_configs(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Returns part -> the record of its ranks and alphas; empty if the file has none.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it describes another kind of adapter.
    """
    try:
        flat = json.loads(metadata.get(_CONFIG_KEY, "{}"))
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
