"""The format that `load_lora_weights` of diffusers reads: `<part>.<path>.lora_A.weight` and `.lora_B.weight`.

Attention is named like all else. The older names that `save_lora_weights` gave it are read, but never written:
diffusers looks at the first name only, and drops all attention of a file that holds both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.formats.capabilities import check_holds_state
from lora_diffusion.formats.metadata import without_hashes
from lora_diffusion.formats.normalize import complete_attention, with_attention
from lora_diffusion.formats.parsed_file import ParsedFile
from lora_diffusion.formats.peft_config import (
    DIFFUSERS_RECORD,
    NOT_IN_PEFT,
    WRONG_AXIS,
    check_one_variant,
    peft_tensors,
    recorded_alpha,
    warn_of_ranks,
    write_config,
)
from lora_diffusion.formats.read_modules import alpha_of, read_modules, split_embeddings
from lora_diffusion.formats.tensor_names import PEFT_PREFIX, split_name
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

_REASON = "load_lora_weights has no layer for it"


class _Diffusers:
    name = naming = "diffusers"
    is_folder = False
    refused: Mapping[str, str] = {**NOT_IN_PEFT, "dora": WRONG_AXIS, "loha": _REASON, "lokr": _REASON}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a dotted path is followed by a suffix of adapters."""
        split_names = (split_name(name) for name in names if not name.startswith(PEFT_PREFIX))
        return any(name.suffix and name.suffix.variant and "." in name.module for name in split_names)

    def normalize(self, state: AdapterState) -> AdapterState:
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
            named = peft_tensors(name, adapter, dtype)
            # transformers loads the text encoders, and wants the whole name.
            tensors |= {full + _whole(full) if key.part != "unet" else full: tensor for full, tensor in named.items()}
            parts.setdefault(key.part, {})[name.removeprefix(f"{key.part}.")] = adapter
        for part, adapters in parts.items():
            check_one_variant(part, adapters.values())
        configs = {
            f"{part}.{field}": value
            for part, adapters in sorted(parts.items())
            for field, value in write_config(adapters).items()
        }
        metadata = {**without_hashes(state.metadata), "format": "pt", DIFFUSERS_RECORD: json.dumps(configs)}
        safetensors_file.save(tensors, metadata, path)

    def read(self, file: ParsedFile, key_map: KeyMap) -> AdapterState:
        """Reads a file; without a record of alphas alpha = rank, as diffusers takes it."""
        (part,) = file.parts
        tensors, embeddings = split_embeddings(part.arrays())
        record = file.diffusers_record
        modules, _ = part.modules

        def find_alpha(name: str) -> float | None:
            beside = modules[name].names.get("alpha")
            if beside is not None:
                return alpha_of(tensors[beside], beside, file.path)
            key = key_map.key(name)
            return recorded_alpha(record[key.part], _bare(key_map, key)) if key.part in record else None

        adapters = read_modules(part.modules, tensors, key_map, find_alpha, file.path)
        for name, config in record.items():
            of_part = {_bare(key_map, key): adapter for key, adapter in adapters.items() if key.part == name}
            warn_of_ranks(of_part, config, file.path)
        metadata = {key: text for key, text in file.metadata.items() if key not in (DIFFUSERS_RECORD, "format")}
        return AdapterState(adapters, metadata, embeddings)  # type: ignore[arg-type]  # arrays


def _bare(key_map: KeyMap, key: ModuleKey) -> str:
    return key_map.name(key).removeprefix(f"{key.part}.")


def _whole(name: str) -> str:
    return ".weight" if name.endswith(".lora_magnitude_vector") else ""


FORMAT = _Diffusers()
