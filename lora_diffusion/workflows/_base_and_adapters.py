"""The family of a base, and adapters that are read for it and attached; PEFT is imported where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.algebra.magnitude_limits import check_magnitudes
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.errors import UnsupportedError
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.data import sample_types
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.formats.detect import detect
from lora_diffusion.tensorfile.arrays import in_float32
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import open_adapter


def find_family(model: ModelOptions, wanted: SampleType | None) -> Family:
    """Returns the family of a base that must work on one type of samples; None takes any.

    Raises:
        UnsupportedError: it works on another.
    """
    family: Family = registry.find("families", model.family)
    if wanted:
        check_family(family, model, wanted)
    return family


def check_family(family: Family, model: ModelOptions, wanted: SampleType) -> None:
    """Checks that a family works on one type of samples; raises as `find_family`."""
    sample_type = sample_types.find(family.sample_type)
    if sample_type is not wanted:
        raise UnsupportedError(
            f"model.family={model.family} does not {wanted.task}, its bases {sample_type.task}; take "
            "another base, or the command for its samples."
        )


def read_adapter(path: Path, family: Family, model: ModelOptions) -> AdapterState:
    """Returns the adapter of a file, a folder of PEFT or a checkpoint of a run, which must fit the base."""
    from lora_diffusion.adapters.state import check_fit

    state = read_unchecked(path, family, model)
    check_fit(state, family.meta_modules(model), str(path))
    check_magnitudes(state, str(path))
    return state


def read_unchecked(path: Path, family: Family, model: ModelOptions) -> AdapterState:
    """Returns an adapter as `read_adapter` does, also one for parts that the base lacks."""
    if (checkpoint := _run_checkpoints.find(path)) is not None:
        return _run_checkpoints.read(checkpoint)[1]
    file = open_adapter(path)
    format_: Format = registry.find("formats", detect(file))
    return in_float32(format_.read(file, family.key_map(format_.name, model)))


def attach(loaded: Loaded, states: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, float]:
    """Injects adapters under the names adapter0, adapter1, ... and returns their weights by name."""
    from lora_diffusion.adapters.state import load_state

    named = {f"adapter{index}": weight for index, weight in enumerate(weights)}
    for (name, weight), state in zip(named.items(), states, strict=True):
        load_state(loaded, state, name, weight)
    return named
