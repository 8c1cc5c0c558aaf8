"""The spelling of PEFT: a folder for each part, with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained(unet, folder / "unet")` reads it. The key map calls a module "<part>.<path>". Where the parts
belong to one model, the key map calls a module by its path in that model, and the folder itself holds the two files:
`PeftModel.from_pretrained(model, folder)` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.files import atomic_path, write_json
from lora_diffusion.core.types import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._lora_config import check_config, find_alpha, write_config
from lora_diffusion.formats._spelling import PEFT, PEFT_PREFIX, read_modules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_FIXED = {"peft_type": "LORA", "task_type": None, "bias": "none", "lora_dropout": 0.0, "inference_mode": True}


class _Peft:
    name = "peft"
    is_folder = True

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a name begins as PEFT begins all of them."""
        return any(name.startswith(PEFT_PREFIX) for name in names)

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype) -> None:
        """Writes a folder with one folder for each part, or the folder of a whole model.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
        """
        with atomic_path(path) as folder:
            groups: dict[str, dict[str, ModuleAdapter]] = {}
            for key, adapter in state:
                part, bare = _split(key_map, key)
                groups.setdefault(part, {})[bare] = adapter
            for part, adapters in groups.items():
                metadata = {**state.metadata, "format": "pt"}
                _safetensors.save(_tensors(adapters, dtype), metadata, folder / part / _TENSORS)
                write_json(folder / part / _CONFIG, {**_FIXED, **write_config(adapters)})

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads such a folder, or that of one part, whose part is then told by its names."""
        modules: dict[ModuleKey, ModuleAdapter] = {}
        metadata: dict[str, str] = {}
        for folder in part_folders(path):
            tensors, told = _safetensors.load(folder / _TENSORS)
            part = _part_of([name.removeprefix(PEFT_PREFIX) for name in tensors], folder, path, key_map)
            named = {_joined(part, name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in tensors.items()}
            modules.update(read_modules(named, PEFT, key_map, _alphas(folder, part), folder))
            metadata.update(told)
        metadata.pop("format", None)
        return AdapterState(modules, metadata)


def part_folders(path: Path) -> list[Path]:
    """Returns the folders that hold an adapter each: `path` itself, or those in it.

    Raises:
        AdapterFileError: there is none, or one lacks its tensors.
    """
    folders = [config.parent for config in sorted([*path.glob(_CONFIG), *path.glob(f"*/{_CONFIG}")])]
    if not folders:
        raise AdapterFileError(f"{path} is not a PEFT adapter: neither it nor a folder in it holds {_CONFIG}.")
    return folders


def tensor_files(path: Path) -> list[Path]:
    """Returns the safetensors file of each part."""
    return [folder / _TENSORS for folder in part_folders(path)]


def _tensors(adapters: Mapping[str, ModuleAdapter], dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, adapter in adapters.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = _safetensors.cast(name, adapter.tensors["down"], dtype)
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = _safetensors.cast(name, adapter.tensors["up"], dtype)
    return tensors


def _split(key_map: KeyMap, key: ModuleKey) -> tuple[str, str]:
    """Returns the folder of a module and its name there; the folder is "" where the parts belong to one model."""
    name = key_map.name(key)
    bare = name.removeprefix(f"{key.part}.")
    return ("", name) if bare == name else (key.part, bare)


def _joined(part: str, bare: str) -> str:
    return f"{part}.{bare}" if part else bare


def _part_of(names: Sequence[str], folder: Path, path: Path, key_map: KeyMap) -> str:
    parts = list(dict.fromkeys(key.part for key, _ in key_map))
    if folder != path:
        return folder.name
    suffixes = tuple(PEFT)
    bare = [next((name.removesuffix(suffix) for suffix in suffixes if name.endswith(suffix)), name) for name in names]
    fitting = [part for part in ("", *parts) if all(_joined(part, name) in key_map for name in bare)]
    if len(fitting) != 1:
        raise AdapterFileError(
            f"{path}: its modules fit {', '.join(fitting) or 'none'} of the parts {', '.join(parts)}; put it into a "
            "folder named after its part."
        )
    return fitting[0]


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the record of ranks and alphas in the folder of one part.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it describes another kind of adapter.
    """
    path = folder / _CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as a LoRA configuration: {error}.") from error
    check_config(config, path)
    return config


def _alphas(folder: Path, part: str) -> Callable[[str], float]:
    config = read_config(folder)
    return lambda name: find_alpha(config, name.removeprefix(f"{part}."))


FORMAT = _Peft()
