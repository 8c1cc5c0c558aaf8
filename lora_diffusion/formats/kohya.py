"""The format of kohya sd-scripts and LyCORIS, which ComfyUI, A1111, Forge and diffusers read too.

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
from lora_diffusion.formats.parsed_file import ParsedFile
from lora_diffusion.formats.peft_config import DIFFUSERS_RECORD
from lora_diffusion.formats.read_modules import FLAGS, SCALED, alpha_of, read_modules, split_embeddings
from lora_diffusion.formats.tensor_names import EMBEDDING, KOHYA, is_read, split_name, unread_variant
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array

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
        flat = [split_name(name) for name in names if name.startswith(_PREFIXES) and "." in name]
        return any((is_read(split) and "." not in split.module) or unread_variant(split.name) for split in flat)

    def normalize(self, state: AdapterState) -> AdapterState:
        """Gives each part one alpha, and each attention of a text encoder all its matrices."""
        return share_alpha(complete_attention(state))

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype | None) -> None:
        """Writes one file, with the hashes that A1111 and Civitai know files by.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
            UnsupportedError: a module is of a variant that the readers of this format misread.
        """
        check_holds_state(self, state)
        tensors: dict[str, Array] = {}
        for key, adapter in state:
            name = key_map.name(key)
            tensors |= _tensors(name, adapter, dtype)
        # Words for prompts are no weights of the adapter and keep their dtype.
        tensors |= {EMBEDDING + name: as_array(tensor) for name, tensor in state.embeddings.items()}
        # diffusers refuses a file with alphas that also holds its own record of them.
        metadata = {key: text for key, text in without_hashes(state.metadata).items() if key != DIFFUSERS_RECORD}
        safetensors_file.save(tensors, {**metadata, **hashes(tensors, metadata)}, path)

    def read(self, file: ParsedFile, key_map: KeyMap) -> AdapterState:
        """Reads a file; a module without alpha has alpha = rank, and a warning tells how programs take it."""
        (part,) = file.parts
        loaded = part.arrays()
        tensors, embeddings = split_embeddings(loaded)
        modules, _ = part.modules
        scaled = [name for name, module in modules.items() if module.variants & SCALED]
        without = [name for name in scaled if "alpha" not in modules[name].names]

        def find_alpha(name: str) -> float | None:
            full = modules[name].names.get("alpha")
            return None if full is None else alpha_of(tensors[full], full, file.path)

        adapters = read_modules(part.modules, tensors, key_map, find_alpha, file.path)
        if without:
            _warn_of_alpha(file.path, without, len(scaled))
        return AdapterState(adapters, file.metadata, embeddings)  # type: ignore[arg-type]  # arrays


def _tensors(name: str, adapter: ModuleAdapter, dtype: torch.dtype | None) -> dict[str, Array]:
    """Returns the tensors of a module by their names in a file."""
    variant = "lora" if adapter.variant == "dora" else adapter.variant.partition("+")[0]
    suffixes = {"bias": ".diff_b", **KOHYA[variant]}
    tensors = {
        f"{name}{suffix}": safetensors_file.cast(name, adapter.tensors[tensor], None if tensor in FLAGS else dtype)
        for tensor, suffix in suffixes.items()
        if tensor in adapter.tensors
    }
    if variant in SCALED or "blocks" in adapter.tensors:
        # Always float32: every app takes it, and an alpha of 1.3 would be another number in bf16.
        tensors[f"{name}.alpha"] = numpy.array(adapter.alpha, numpy.float32)
    return tensors


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
