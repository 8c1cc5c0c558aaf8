"""The spelling of kohya sd-scripts and LyCORIS, which ComfyUI, A1111, Forge and diffusers read too.

`<module>.lora_down.weight`, `<module>.lora_up.weight`, `<module>.alpha` and so on, where <module> is a prefix and the
path of the module with "_" for ".".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.formats.capabilities import check_holds_state
from lora_diffusion.formats.metadata import hashes, without_hashes
from lora_diffusion.formats.normalize import complete_attention, share_alpha
from lora_diffusion.formats.tensor_names import (
    EMBEDDING,
    FLAGS,
    KOHYA,
    SCALED,
    group_names,
    one_alpha,
    read_modules,
    split_embeddings,
    split_name,
    unread_kind,
)
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array, in_float32

if TYPE_CHECKING:
    import torch

    from lora_diffusion.core.keymap import KeyMap

_PREFIXES = ("lora_", "lycoris_")
_WRONG_AXIS = (
    "ComfyUI, Forge and A1111 misread a magnitude along the outputs, each in its own way. Train with "
    "adapter.variant=dora, or merge it into the base"
)


class _Kohya:
    name = naming = "kohya"
    is_folder = False
    refused: Mapping[str, str] = {"dora_out": _WRONG_AXIS, "loha+dora_out": _WRONG_AXIS, "lokr+dora_out": _WRONG_AXIS}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a module name without a dot is followed by a suffix of kohya or LyCORIS."""
        flat = [name for name in names if name.startswith(_PREFIXES) and "." in name]
        return any((split_name(name) and "." not in _module(name)) or unread_kind(name) for name in flat)

    def portable(self, state: AdapterState) -> AdapterState:
        """Gives each part one alpha, and each attention of a text encoder all its matrices."""
        return share_alpha(complete_attention(state))

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype | None) -> None:
        """Writes one file, with the hashes that A1111 and Civitai know files by.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
            UnsupportedError: a module is of a variant that the readers of this spelling misread.
        """
        check_holds_state(self, state)
        tensors: dict[str, Array] = {}
        for key, adapter in state:
            name = key_map.name(key)
            tensors |= _tensors(name, adapter, dtype)
        # Words for prompts are no weights of the adapter and keep their dtype.
        tensors |= {EMBEDDING + name: as_array(tensor) for name, tensor in state.embeddings.items()}
        # diffusers refuses a file with alphas that also holds its own record of them.
        told = {key: value for key, value in without_hashes(state.metadata).items() if key != "lora_adapter_metadata"}
        safetensors_file.save(tensors, {**told, **hashes(tensors, told)}, path)

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file; a module without alpha has alpha = rank, and a warning tells how programs take it."""
        return in_float32(self.read_stored(path, key_map))

    def read_stored(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file as `read` does, and keeps the numbers as arrays of their own type."""
        loaded, metadata = safetensors_file.load(path)
        tensors, embeddings = split_embeddings(loaded)
        groups, _ = group_names(tensors)
        without = [name for name, group in groups.items() if "alpha" not in group.names and group.kinds & SCALED]

        def find_alpha(name: str) -> float | None:
            full = groups[name].names.get("alpha")
            return None if full is None else one_alpha(tensors[full], full, path)

        modules = read_modules(tensors, key_map, find_alpha, path)
        if without:
            _warn_of_alpha(path, without, len([name for name, group in groups.items() if group.kinds & SCALED]))
        return AdapterState(modules, metadata, embeddings)  # type: ignore[arg-type]  # arrays


def _tensors(name: str, adapter: ModuleAdapter, dtype: torch.dtype | None) -> dict[str, Array]:
    """Returns the tensors of a module by their names in a file."""
    kind = "lora" if adapter.variant == "dora" else adapter.variant.partition("+")[0]
    suffixes = {"bias": ".diff_b", **KOHYA[kind]}
    tensors = {
        f"{name}{suffix}": safetensors_file.cast(name, adapter.tensors[tensor], None if tensor in FLAGS else dtype)
        for tensor, suffix in suffixes.items()
        if tensor in adapter.tensors
    }
    if kind in SCALED or "blocks" in adapter.tensors:
        # Always float32: every client takes it, and an alpha of 1.3 would be another number in bf16.
        tensors[f"{name}.alpha"] = numpy.array(adapter.alpha, numpy.float32)
    return tensors


def _module(name: str) -> str:
    found = split_name(name)
    return found[0] if found else name


def _warn_of_alpha(path: Path, without: Sequence[str], num_modules: int) -> None:
    if len(without) == num_modules:
        logger.warning("%s has no alpha; alpha = rank is assumed, as every program does.", path)
        return
    logger.warning(
        "%s: %d of %d modules have no alpha; alpha = rank is assumed, as ComfyUI, Forge, A1111 and kohya do. diffusers "
        "takes the most common alpha of the file instead: %s",
        path,
        len(without),
        num_modules,
        name_some(list(without)),
    )


FORMAT = _Kohya()
