"""The spelling of PEFT: a folder for each part, with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained(unet, folder / "unet")` reads it. The key map calls a module "<part>.<path>". Where the parts
belong to one model, the key map calls a module by its path in that model, and the folder itself holds the two files:
`PeftModel.from_pretrained(model, folder)` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.files import atomic_path, write_json
from lora_diffusion.core.types import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._arrays import Array, in_float32
from lora_diffusion.formats._holding import check_holds
from lora_diffusion.formats._lora_config import (
    check_config,
    find_alpha,
    peft_type,
    without_recorded_scale,
    write_config,
)
from lora_diffusion.formats._peft_tensors import WRONG_AXIS, check_one_kind, peft_tensors
from lora_diffusion.formats._spelling import PEFT_PREFIX, read_modules, split_name
from lora_diffusion.formats.metadata import without_hashes

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"bias": "none", "lora_dropout": 0.0},
    "LOHA": {"rank_dropout": 0.0, "module_dropout": 0.0},
    "LOKR": {"rank_dropout": 0.0, "module_dropout": 0.0},
}
"""Kind -> what our files of it always say."""


class _Peft:
    name = "peft"
    is_folder = True
    refused: Mapping[str, str] = {"dora": WRONG_AXIS}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a name begins as PEFT begins all of them."""
        return any(name.startswith(PEFT_PREFIX) for name in names)

    def portable(self, state: AdapterState) -> AdapterState:
        """Returns the state as it is: PEFT reads the rank and alpha of each module from its record."""
        return state

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype | None) -> None:
        """Writes a folder with one folder for each part, or the folder of a whole model.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
            UnsupportedError: PEFT cannot hold a variant, or mixes of them in one folder.
        """
        check_holds(self, (adapter.variant for _, adapter in state))
        groups: dict[str, dict[str, ModuleAdapter]] = {}
        for key, adapter in state:
            part, bare = _split(key_map, key)
            groups.setdefault(part, {})[bare] = adapter
        with atomic_path(path) as folder:
            for part, adapters in groups.items():
                check_one_kind(part or "the model", adapters.values())
                tensors: dict[str, Array] = {}
                for name, adapter in adapters.items():
                    tensors |= peft_tensors(PEFT_PREFIX + name, adapter, dtype)
                _safetensors.save(tensors, {**without_hashes(state.metadata), "format": "pt"}, folder / part / _TENSORS)
                write_json(folder / part / _CONFIG, _record(adapters))

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads such a folder, or that of one part, whose part is then told by its names."""
        return in_float32(self.read_stored(path, key_map))

    def read_stored(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a folder as `read` does, and keeps the numbers as arrays of their own type."""
        modules: dict[ModuleKey, ModuleAdapter] = {}
        metadata: dict[str, str] = {}
        for folder in part_folders(path):
            config = read_config(folder)
            tensors, told = _safetensors.load(folder / _TENSORS)
            part = _part_of([name.removeprefix(PEFT_PREFIX) for name in tensors], folder, path, key_map)
            named = {_joined(part, name.removeprefix(PEFT_PREFIX)): tensor for name, tensor in tensors.items()}
            for key, adapter in read_modules(named, key_map, partial(_alpha, config, part), folder).items():
                modules[key] = without_recorded_scale(adapter, config, _split(key_map, key)[1])
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


def _record(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    kind = peft_type(adapters)
    return {"peft_type": kind, "task_type": None, **_FIXED[kind], "inference_mode": True, **write_config(adapters)}


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
    bare = [found[0] if (found := split_name(name)) else name for name in names]
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
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read as a LoRA configuration: {error}.") from error
    check_config(config, path)
    return config


def _alpha(config: Mapping[str, Any], part: str, name: str) -> float:
    return find_alpha(config, name.removeprefix(f"{part}."))


FORMAT = _Peft()
