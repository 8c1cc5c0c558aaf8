"""The spelling of kohya sd-scripts, which ComfyUI, A1111, Forge and diffusers read too.

`<module>.lora_down.weight`, `<module>.lora_up.weight` and `<module>.alpha`, where <module> is a prefix and the path of
the module with "_" for ".".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.core.types import AdapterState, ModuleAdapter, ModuleKey
from lora_diffusion.formats import _safetensors
from lora_diffusion.formats._spelling import KOHYA, read_modules, variant_of
from lora_diffusion.formats.metadata import hashes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_diffusion.core.keymap import KeyMap


class _Kohya:
    name = "kohya"
    is_folder = False

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether a module name without a dot is followed by a suffix of kohya or LyCORIS."""
        flat = [name for name in names if name.startswith("lora_") and "." in name]
        return any(name[name.index(".") :] in KOHYA or variant_of(name) for name in flat)

    def write(self, state: AdapterState, key_map: KeyMap, path: Path, dtype: torch.dtype) -> None:
        """Writes one file, with the hashes that A1111 and Civitai know files by.

        Raises:
            AdapterFileError: the map lacks a module.
            NonFiniteError: a value does not fit `dtype`.
        """
        import torch

        tensors: dict[str, Tensor] = {}
        for key, adapter in _share_alpha(state).items():
            name = key_map.name(key)
            tensors[f"{name}.lora_down.weight"] = _safetensors.cast(name, adapter.tensors["down"], dtype)
            tensors[f"{name}.lora_up.weight"] = _safetensors.cast(name, adapter.tensors["up"], dtype)
            # Always float32: every client takes it, and an alpha of 1.3 would be another number in bf16.
            tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
        told = {key: value for key, value in state.metadata.items() if not key.startswith("sshs_")}
        _safetensors.save(tensors, {**told, **hashes(tensors, told)}, path)

    def read(self, path: Path, key_map: KeyMap) -> AdapterState:
        """Reads a file; a module without alpha has alpha = rank, as all clients take it, and a warning says so."""
        tensors, metadata = _safetensors.load(path)
        without: list[str] = []

        def find_alpha(name: str) -> float | None:
            alpha = tensors.get(f"{name}.alpha")
            if alpha is None:
                without.append(name)
                return None
            if alpha.numel() != 1:
                raise AdapterFileError(
                    f"{path}: {name}.alpha must be one number, but its shape is {list(alpha.shape)}."
                )
            # Seven digits name a float32, so that 1.3 comes back as 1.3.
            return float(f"{alpha.float().item():.7g}")

        modules = read_modules(tensors, KOHYA, key_map, find_alpha, path)
        if without:
            logger.warning(
                "%s: %d modules have no alpha; alpha = rank is assumed: %s", path, len(without), name_some(without)
            )
        return AdapterState(modules, metadata)


def _share_alpha(state: AdapterState) -> dict[ModuleKey, ModuleAdapter]:
    """Gives all modules of a part one alpha and scales `up` instead, so that every change stays what it was.

    diffusers applies the most common alpha of a file to all attention modules, whatever stands in theirs
    (`_get_alpha_name` and `get_peft_kwargs` of diffusers 0.42.1).
    """
    shared = {
        part: Counter(adapter.alpha for key, adapter in state if key.part == part).most_common(1)[0][0]
        for part in state.parts()
    }
    modules = {}
    for key, adapter in state:
        alpha = shared[key.part]
        up = adapter.tensors["up"]
        scaled = up if adapter.alpha == alpha else up.float() * (adapter.alpha / alpha)
        modules[key] = ModuleAdapter(adapter.variant, {**adapter.tensors, "up": scaled}, alpha)
    return modules


FORMAT = _Kohya()
