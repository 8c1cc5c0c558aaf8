"""A family, a format, a metric and a variant of another package; tests/test_other_package.py installs it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_diffusion.adapters import variants
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.families.sd1 import FAMILY as SD1
from lora_diffusion.families.sd1 import SD1Options
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array, in_float32


@dataclass(frozen=True)
class MoonOptions(SD1Options):
    """A base of the moon family."""

    family: str = "moon"
    """Family of the base model."""
    craters: int = 3
    """A setting that no other family has."""


class Moon:
    """Stable Diffusion 1 under another name, on bases of the same layout."""

    architecture = replace(
        SD1.architecture,
        name="moon",
        title="Moon",
        modelspec={"epsilon": "moon-v1", "v_prediction": "moon-v1"},
        kohya_versions={},
        metadata_starts=("moon",),
        name_marks=(),
    )
    options_type = MoonOptions
    sample_type, parts = SD1.sample_type, SD1.parts

    def check(self, options: MoonOptions) -> BaseInfo:
        """Looks at the base, and calls it by its own name."""
        return replace(SD1.check(_as_sd1(options)), architecture="moon-v1")

    def __getattr__(self, name: str) -> Any:
        """Returns what Stable Diffusion 1 does, with its options in place of those of the moon."""
        method = getattr(SD1, name)
        return lambda *args, **kwargs: method(*map(_as_sd1, args), **kwargs)


def _as_sd1(value: Any) -> Any:
    if not isinstance(value, MoonOptions):
        return value
    shared = {field.name: getattr(value, field.name) for field in fields(SD1Options)}
    return SD1Options(**{**shared, "family": "sd1"})


FAMILY = Moon()


class Plain:
    """Files of the form MODULE!TENSOR, the modules named as diffusers names them."""

    name = "plain"
    naming = "diffusers"
    is_folder = False
    refused: Mapping[str, str] = {"loha": "it knows two factors only", "lokr": "it knows two factors only"}

    def detect(self, names: Sequence[str]) -> bool:
        """Says whether the names have the mark."""
        return all("!" in name for name in names)

    def portable(self, state: AdapterState) -> AdapterState:
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

    def read(self, path: Path, key_map: Any) -> AdapterState:
        """Reads a file in float32."""
        return in_float32(self.read_stored(path, key_map))

    def read_stored(self, path: Path, key_map: Any) -> AdapterState:
        """Reads a file as its numbers are stored."""
        tensors, metadata = safetensors_file.load(path)
        modules: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for name, values in tensors.items():
            module, _, tensor = name.partition("!")
            modules[module][tensor] = values
        alphas = {name: float(own.pop("alpha")) for name, own in modules.items()}
        adapters = {key_map.key(name): ModuleAdapter("lora", own, alphas[name]) for name, own in modules.items()}
        return AdapterState(adapters, metadata)


FORMAT = Plain()


class Brightness:
    """How bright the pictures are, 0 to 1."""

    name = "brightness"
    meaning = "how bright the picture is"
    higher_is_better = True
    judges = "asked"
    needs: frozenset[str] = frozenset()
    scorers: tuple[str, ...] = ()
    per_prompt = False

    def score(self, evidence: Evidence) -> Scores:
        """Returns the mean of each picture's pixels."""
        import torch

        opened = (Image.open(one) if isinstance(one, Path) else one for one in evidence.pictures)
        return Scores(torch.tensor([float(np.asarray(one.convert("L")).mean()) / 255 for one in opened]))

    def chance(self, evidence: Evidence) -> float | None:
        """Gives none."""
        del evidence

    def real(self, evidence: Evidence) -> float | None:
        """Gives none."""
        del evidence


METRIC = Brightness()
VARIANT = replace(
    variants.find("lora"), name="crater", summary="lora with scale alpha / rank ** 0.75", alpha_power=0.25
)
