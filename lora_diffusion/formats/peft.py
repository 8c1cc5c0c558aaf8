"""The spelling of PEFT: a folder for each part, with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained(unet, folder / "unet")` reads it. The key map calls a module "<part>.<path>". Where the parts
belong to one model, the key map calls a module by its path in that model, and the folder itself holds the two files:
`PeftModel.from_pretrained(model, folder)` reads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.files import atomic_path, not_a_file, parse_json, public_base, read_json, write_json
from lora_diffusion.formats.capabilities import check_holds_state
from lora_diffusion.formats.metadata import BASE, without_hashes
from lora_diffusion.formats.peft_config import (
    NOT_IN_PEFT,
    WRONG_AXIS,
    check_config,
    check_one_kind,
    find_alpha,
    peft_tensors,
    peft_type,
    warn_of_ranks,
    without_recorded_scale,
    write_config,
)
from lora_diffusion.formats.tensor_names import PEFT_PREFIX, read_modules, split_name
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, in_float32

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
"""What older versions of PEFT wrote instead."""
_SHOWN = 10
_TOLD = (BASE, "auto_mapping", "task_type")
"""What a record tells of the base and its use, in metadata by the same names; the mapping as JSON."""
_CLASSES = {
    "whisper": ("transformers.models.whisper.modeling_whisper", "WhisperForConditionalGeneration"),
    "llava": ("transformers.models.llava.modeling_llava", "LlavaForConditionalGeneration"),
    "llava-next": ("transformers.models.llava_next.modeling_llava_next", "LlavaNextForConditionalGeneration"),
}
"""Architecture whose parts belong to one model -> module and class of that."""
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"bias": "none", "lora_dropout": 0.0},
    "LOHA": {"rank_dropout": 0.0, "module_dropout": 0.0},
    "LOKR": {"rank_dropout": 0.0, "module_dropout": 0.0},
}
"""Kind -> what our files of it always say."""


class _Peft:
    name = naming = "peft"
    is_folder = True
    refused: Mapping[str, str] = {"dora": WRONG_AXIS, **NOT_IN_PEFT}

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
        check_holds_state(self, state)
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
                told = {key: text for key, text in without_hashes(state.metadata).items() if key not in _TOLD}
                safetensors_file.save(tensors, {**told, "format": "pt"}, folder / part / TENSORS)
                write_json(folder / part / CONFIG, _base(state.metadata, part) | _record(adapters))

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads such a folder, or that of one part, whose part is then told by its names."""
        return in_float32(self.read_stored(path, key_map))

    def read_stored(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a folder as `read` does, and keeps the numbers as arrays of their own type."""
        modules: dict[ModuleKey, ModuleAdapter] = {}
        metadata: dict[str, str] = {}
        for folder in part_folders(path):
            config = read_config(folder)
            tensors, told = safetensors_file.load(folder / TENSORS)
            plain = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
            part = _part_of(plain, folder, path, key_map)
            named = {_joined(part, name): tensor for name, tensor in plain.items()}
            found = read_modules(named, key_map, partial(_alpha, config, part), folder)
            own = {_split(key_map, key)[1]: key for key in found}
            warn_of_ranks({bare: found[key] for bare, key in own.items()}, config, folder)
            modules |= {key: without_recorded_scale(found[key], config, bare) for bare, key in own.items()}
            metadata.update(told | _told(config))
        metadata.pop("format", None)
        return AdapterState(modules, metadata)


def part_folders(path: Path) -> list[Path]:
    """Returns the folders that hold an adapter each: `path` itself, or those in it.

    Raises:
        AdapterFileError: there is none, or one lacks its tensors.
    """
    folders = [config.parent for config in sorted([*path.glob(CONFIG), *path.glob(f"*/{CONFIG}")])]
    if not folders:
        raise AdapterFileError(f"{path} is not a PEFT adapter: neither it nor a folder in it holds {CONFIG}.")
    return folders


def tensor_files(path: Path) -> list[Path]:
    """Returns the safetensors file of each part.

    Raises:
        AdapterFileError: see `part_folders`; or older versions of PEFT wrote a pickle.
    """
    folders = part_folders(path)
    for folder in folders:
        if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
            raise safetensors_file.pickled(folder / PICKLE, path, "NEW --to peft")
    return [folder / TENSORS for folder in folders]


def headers(path: Path) -> list[safetensors_file.Header]:
    """Returns the header of a file, or those of the files of a PEFT folder.

    Raises:
        AdapterFileError: one cannot be read, or it is a file of PEFT without the record beside it.
    """
    if path.is_dir():
        return [safetensors_file.read_header(file) for file in tensor_files(path)]
    header = safetensors_file.read_header(path)
    if header.tensors and all(name.startswith(PEFT_PREFIX) for name in header.tensors):
        raise AdapterFileError(
            f"{path} holds only the tensors of a PEFT adapter, whose ranks and alphas stand in {CONFIG} beside it; "
            f"give the folder {path.parent} with both, under the names that PEFT gave them."
        )
    return [header]


def full_name(name: str, part: str) -> str:
    """Returns a tensor's name without PEFT's prefix and with the part before it; "" where there is none."""
    return _joined(part, name.removeprefix(PEFT_PREFIX))


def _record(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    kind = peft_type(adapters)
    return {"peft_type": kind, **_FIXED[kind], "inference_mode": True, **write_config(adapters)}


def _base(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """Returns what AutoPeftModel and pipelines load the base by; null where it has no name that others know.

    Args:
        metadata: of the adapter.
        part: whose folder it is; "" where the folder is that of a whole model, which has a class of its own.
    """
    mapping, task = _mapping(metadata.get("auto_mapping", "")), metadata.get("task_type")
    known = _CLASSES.get(metadata.get("modelspec.architecture", "").split("/")[0])
    if known and not part and not task:
        mapping = dict(zip(("parent_library", "base_model_class"), known, strict=True))
    return {"task_type": task, "auto_mapping": mapping, BASE: metadata.get(BASE)}


def _told(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the same as metadata; a path on the machine of whoever wrote it says nothing, and is left out."""
    base, task, mapping = (config.get(key) for key in (BASE, "task_type", "auto_mapping"))
    found = {
        BASE: public_base(base) if isinstance(base, str) else None,
        "task_type": task if isinstance(task, str) and re.fullmatch(r"[A-Z0-9_]{1,40}", task) else None,
        "auto_mapping": text if isinstance(mapping, dict) and _mapping(text := json.dumps(mapping)) else None,
    }
    return {key: text for key, text in found.items() if text}


def _mapping(text: str) -> dict[str, str] | None:
    """Returns the class of transformers or diffusers that loads a base; None where the text says another thing."""
    try:
        told = parse_json(text)
    except ValueError:
        return None
    if not isinstance(told, dict) or told.keys() != {"base_model_class", "parent_library"}:
        return None
    is_known = re.fullmatch(r"(transformers|diffusers)[\w.]*", str(told["parent_library"]))
    return told if is_known and re.fullmatch(r"\w+", str(told["base_model_class"])) else None


def _split(key_map: KeyMap, key: ModuleKey) -> tuple[str, str]:
    """Returns the folder of a module and its name there; the folder is "" where the parts belong to one model."""
    name = key_map.name(key)
    bare = name.removeprefix(f"{key.part}.")
    return ("", name) if bare == name else (key.part, bare)


def _joined(part: str, bare: str) -> str:
    return f"{part}.{bare}" if part else bare


def _part_of(tensors: Mapping[str, Array], folder: Path, path: Path, key_map: KeyMap) -> str:
    """Returns the part that a folder is for: its name, or that whose modules have the names and sizes in it."""
    if folder != path:
        return folder.name
    modules = list(dict.fromkeys(map(_module, tensors)))
    parts = ["", *dict.fromkeys(key.part for key, _ in key_map)]
    unknown = {part: [name for name in modules if _joined(part, name) not in key_map] for part in parts}
    fewest = min(unknown.values(), key=len)
    if fewest and len(fewest) < len(modules):
        raise UnsupportedError(
            f"{path}: {len(fewest)} of its {len(modules)} modules are none that an adapter for this base can have "
            "here. Train it without them.",
            fewest[:_SHOWN],
        )
    fitting = [part for part in parts if not unknown[part]]
    if len(fitting) > 1:
        fitting = [part for part in fitting if _has_sizes(tensors, part, key_map)] or fitting
    if len(fitting) > 1:
        raise AdapterFileError(
            f"{path}: its modules fit {' and '.join(fitting)}; put it into a folder named {' or '.join(fitting)}, and "
            "give the folder around that."
        )
    return fitting[0] if fitting else ""


def _module(name: str) -> str:
    found = split_name(name)
    return found[0] if found else re.split(r"\.(?:base_layer|lora_)", name)[0]


def _has_sizes(tensors: Mapping[str, Array], part: str, key_map: KeyMap) -> bool:
    """Says whether no factor contradicts the sizes of a part of SDXL, whose text encoders have modules of one name."""
    shapes = published_shapes(DIFFUSION["sdxl"])
    for name, tensor in tensors.items():
        key = key_map.key(_joined(part, _module(name)))
        axis = {"down": 1, "up": 0}.get((split_name(name) or ("", "", ""))[2])
        if axis is not None and tensor.shape[axis : axis + 1] != shapes.get(key, ())[axis : axis + 1]:
            return False
    return True


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the record of ranks and alphas in the folder of one part.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it describes another kind of adapter.
    """
    path = folder / CONFIG
    if kind := not_a_file(path):
        raise AdapterFileError(f"{path} is {kind} and no file; get the folder again.")
    try:
        config: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read as a LoRA configuration: {error}.") from error
    check_config(config, path)
    return config


def _alpha(config: Mapping[str, Any], part: str, name: str) -> float:
    return find_alpha(config, name.removeprefix(f"{part}."))


FORMAT = _Peft()
