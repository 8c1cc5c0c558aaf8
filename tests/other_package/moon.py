"""A family, a format, a metric and a variant of another package; tests/test_other_package.py installs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_diffusion.adapters import variants
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.families.sd1 import FAMILY as SD1
from lora_diffusion.families.sd1 import SD1Options
from lora_diffusion.families.stable_diffusion.family import StableDiffusion
from lora_diffusion.formats.parsed_file import ParsedFile
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array


@dataclass(frozen=True)
class MoonOptions(SD1Options):
    """A base of the moon family."""

    family: str = "moon"
    """Family of the base model."""
    craters: int = 3
    """A setting that no other family has."""


ARCHITECTURE = replace(
    SD1.architecture,
    name="moon",
    title="Moon",
    modelspec=dict.fromkeys(("epsilon", "v_prediction"), "moon-v1"),
    kohya_versions={},
    metadata_starts=("moon",),
    name_marks=(),
)
FAMILY = StableDiffusion(ARCHITECTURE, MoonOptions)


class Plain:
    """Files of the form MODULE!TENSOR, the modules named as diffusers names them."""

    name = "plain"
    naming = "diffusers"
    is_folder = False
    refused: Mapping[str, str] = {"loha": "it knows two factors only", "lokr": "it knows two factors only"}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether the names have the mark."""
        return all("!" in name for name in names)

    def normalize(self, state: AdapterState) -> AdapterState:
        """Returns the state."""
        return state

    def write(self, state: AdapterState, key_map: Any, path: Path, dtype: Any) -> None:
        """Writes one file."""
        tensors: dict[str, Array] = {}
        for key, adapter in state:
            name = key_map.name(key)
            for tensor, values in adapter.tensors.items():
                tensors[f"{name}!{tensor}"] = safetensors_file.cast(name, values, dtype)
            tensors[f"{name}!alpha"] = as_array(np.array(adapter.alpha, np.float32))
        safetensors_file.save(tensors, dict(state.metadata), path)

    def read(self, file: ParsedFile, key_map: Any) -> AdapterState:
        """Reads a file as its numbers are stored."""
        (part,) = file.parts
        tensors, metadata = part.arrays(), file.metadata
        modules: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for name, values in tensors.items():
            module, _, tensor = name.partition("!")
            modules[module][tensor] = values
        alphas = {name: float(own.pop("alpha")) for name, own in modules.items()}
        adapters = {key_map.key(name): ModuleAdapter("lora", own, alphas[name]) for name, own in modules.items()}
        return AdapterState(adapters, metadata)


FORMAT = Plain()


class Brightness:
    """How bright the images are, 0 to 1."""

    name = "brightness"
    meaning = "how bright the image is"
    higher_is_better = True
    outputs = "concept"
    needs: frozenset[str] = frozenset()
    scorers: tuple[str, ...] = ()
    per_prompt = False

    def score(self, evidence: Evidence) -> Scores:
        """Returns the mean of each image's pixels."""
        import torch

        opened = (Image.open(one) if isinstance(one, Path) else one for one in evidence.images)
        return Scores(torch.tensor([float(np.asarray(one.convert("L")).mean()) / 255 for one in opened]))

    def random_baseline(self, evidence: Evidence) -> float | None:
        """Gives none."""
        del evidence

    def reference_score(self, evidence: Evidence) -> float | None:
        """Gives none."""
        del evidence


METRIC = Brightness()
VARIANT = replace(
    variants.find("lora"), name="crater", summary="lora with scale alpha / rank ** 0.75", alpha_power=0.25
)
