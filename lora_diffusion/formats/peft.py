"""The format of PEFT: a folder for each part, with adapter_config.json and adapter_model.safetensors.

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

from lora_diffusion.architectures import DIFFUSION, TEXT_OUTPUT
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.files import atomic_path, parse_json, public_base, write_json
from lora_diffusion.formats.capabilities import check_holds_state
from lora_diffusion.formats.metadata import BASE, without_hashes
from lora_diffusion.formats.parsed_file import CONFIG, TENSORS, ParsedFile, ParsedPart, full_name
from lora_diffusion.formats.peft_config import (
    NOT_IN_PEFT,
    WRONG_AXIS,
    check_one_variant,
    peft_tensors,
    peft_type,
    recorded_alpha,
    warn_of_ranks,
    without_recorded_scale,
    write_config,
)
from lora_diffusion.formats.read_modules import read_modules
from lora_diffusion.formats.tensor_names import PEFT_PREFIX, ParsedTensor, group, is_read
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

_SHOWN = 10
_OF_THE_BASE = (BASE, "auto_mapping", "task_type")
"""What a record tells of the base and its use, in metadata by the same names; the mapping as JSON."""
_FIXED: Mapping[str, Mapping[str, Any]] = {
    "LORA": {"bias": "none", "lora_dropout": 0.0},
    "LOHA": {"rank_dropout": 0.0, "module_dropout": 0.0},
    "LOKR": {"rank_dropout": 0.0, "module_dropout": 0.0},
}
"""Type -> what our files of it always say."""


class _Peft:
    name = naming = "peft"
    is_folder = True
    refused: Mapping[str, str] = {"dora": WRONG_AXIS, **NOT_IN_PEFT}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a name begins as PEFT begins all of them."""
        return any(name.startswith(PEFT_PREFIX) for name in names)

    def normalize(self, state: AdapterState) -> AdapterState:
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
                check_one_variant(part or "the model", adapters.values())
                tensors: dict[str, Array] = {}
                for name, adapter in adapters.items():
                    tensors |= peft_tensors(PEFT_PREFIX + name, adapter, dtype)
                texts = {key: text for key, text in without_hashes(state.metadata).items() if key not in _OF_THE_BASE}
                safetensors_file.save(tensors, {**texts, "format": "pt"}, folder / part / TENSORS)
                write_json(folder / part / CONFIG, _base(state.metadata, part) | _record(adapters))

    def read(self, file: ParsedFile, key_map: KeyMap) -> AdapterState:
        """Reads such a folder, or that of one part, whose part is then told by its names."""
        adapters: dict[ModuleKey, ModuleAdapter] = {}
        metadata: dict[str, str] = {}
        for parsed in file.parts:
            config, folder = parsed.config, parsed.source.parent
            arrays = parsed.arrays()
            part = parsed.part or _part_of(parsed, file.path, key_map)
            tensors = {full_name(name, part): array for name, array in arrays.items()}
            modules = read_modules(
                group(parsed.tensors_in(part)), tensors, key_map, partial(_alpha, config, part), folder
            )
            paths = {_split(key_map, key)[1]: key for key in modules}
            warn_of_ranks({path: modules[key] for path, key in paths.items()}, config, folder)
            adapters |= {key: without_recorded_scale(modules[key], config, path) for path, key in paths.items()}
            metadata.update(dict(parsed.header.metadata) | _metadata(config))
        metadata.pop("format", None)
        return AdapterState(adapters, metadata)


def _record(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    name = peft_type(adapters)
    return {"peft_type": name, **_FIXED[name], "inference_mode": True, **write_config(adapters)}


def _base(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """Returns what AutoPeftModel and pipelines load the base by; null where it has no name that others know.

    Args:
        metadata: of the adapter.
        part: whose folder it is; "" where the folder is that of a whole model, which has a class of its own.
    """
    mapping, task = _mapping(metadata.get("auto_mapping", "")), metadata.get("task_type")
    modelspec = metadata.get("modelspec.architecture", "")
    known = next(filter(None, (architecture.model_class(modelspec) for architecture in TEXT_OUTPUT.values())), None)
    if known and not part and not task:
        mapping = dict(zip(("parent_library", "base_model_class"), known, strict=True))
    return {"task_type": task, "auto_mapping": mapping, BASE: metadata.get(BASE)}


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the same as metadata; a path on the machine of whoever wrote it says nothing, and is left out."""
    base, task, mapping = (config.get(key) for key in (BASE, "task_type", "auto_mapping"))
    texts = {
        BASE: public_base(base) if isinstance(base, str) else None,
        "task_type": task if isinstance(task, str) and re.fullmatch(r"[A-Z0-9_]{1,40}", task) else None,
        "auto_mapping": text if isinstance(mapping, dict) and _mapping(text := json.dumps(mapping)) else None,
    }
    return {key: text for key, text in texts.items() if text}


def _mapping(text: str) -> dict[str, str] | None:
    """Returns the class of transformers or diffusers that loads a base; None where the text says another thing."""
    try:
        mapping = parse_json(text)
    except ValueError:
        return None
    if not isinstance(mapping, dict) or mapping.keys() != {"base_model_class", "parent_library"}:
        return None
    is_known = re.fullmatch(r"(transformers|diffusers)[\w.]*", str(mapping["parent_library"]))
    return mapping if is_known and re.fullmatch(r"\w+", str(mapping["base_model_class"])) else None


def _split(key_map: KeyMap, key: ModuleKey) -> tuple[str, str]:
    """Returns the folder of a module and its name there; the folder is "" where the parts belong to one model."""
    name = key_map.name(key)
    bare = name.removeprefix(f"{key.part}.")
    return ("", name) if bare == name else (key.part, bare)


def _part_of(parsed: ParsedPart, path: Path, key_map: KeyMap) -> str:
    """Returns the part that a folder is for whose modules have the names and sizes in it."""
    modules = list(dict.fromkeys(_module(tensor) for tensor in parsed.tensors_in("")))
    parts = ["", *dict.fromkeys(key.part for key, _ in key_map)]
    unknown = {part: [name for name in modules if full_name(name, part) not in key_map] for part in parts}
    fewest = min(unknown.values(), key=len)
    if fewest and len(fewest) < len(modules):
        raise UnsupportedError(
            f"{path}: {len(fewest)} of its {len(modules)} modules are none that an adapter for this base can have "
            "here. Train it without them.",
            fewest[:_SHOWN],
        )
    fitting = [part for part in parts if not unknown[part]]
    if len(fitting) > 1:
        fitting = [part for part in fitting if _has_sizes(parsed, part, key_map)] or fitting
    if len(fitting) > 1:
        raise AdapterFileError(
            f"{path}: its modules fit {' and '.join(fitting)}; put it into a folder named {' or '.join(fitting)}, and "
            "give the folder around that."
        )
    return fitting[0] if fitting else ""


def _module(tensor: ParsedTensor) -> str:
    return tensor.module if is_read(tensor) else re.split(r"\.(?:base_layer|lora_)", tensor.name)[0]


def _has_sizes(parsed: ParsedPart, part: str, key_map: KeyMap) -> bool:
    """Says whether no factor contradicts the sizes of a part of a base with text encoders that name modules alike."""
    shapes = next(
        published_shapes(architecture) for architecture in DIFFUSION.values() if len(architecture.text_encoders) > 1
    )
    for tensor in parsed.tensors:
        key = key_map.key(full_name(_module(tensor), part))
        axis = {"down": 1, "up": 0}.get(tensor.suffix.tensor if tensor.suffix and is_read(tensor) else "")
        shape = parsed.header.tensors[tensor.name].shape
        if axis is not None and shape[axis : axis + 1] != shapes.get(key, ())[axis : axis + 1]:
            return False
    return True


def _alpha(config: Mapping[str, Any], part: str, name: str) -> float:
    return recorded_alpha(config, name.removeprefix(f"{part}."))


FORMAT = _Peft()
