"""Adapter files in another spelling; no base model is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.core import registry
from lora_diffusion.core.device import find_dtype
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.protocols import Family, Format
from lora_diffusion.core.types import AdapterState
from lora_diffusion.formats import READERS, as_safetensors, detect, fit_dimensions, with_attention
from lora_diffusion.formats.metadata import with_base
from lora_diffusion.formats.verified import write_exactly
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._files import (
    check_target,
    common_dtype,
    dtype_named,
    read_stored_alone,
    stored_dtype,
    with_embeddings,
)


@dataclass(frozen=True)
class Conversion:
    """An adapter file in another spelling."""

    path: Path
    source_format: str
    format: str
    family: str
    variants: Mapping[str, int]
    """Kind of adapter -> number of modules."""
    num_modules: Mapping[str, int]
    """Part -> number of modules."""
    dtype: str
    rounding: float
    """Norm of what rounding to the number type changed, relative to the norm of all tensors."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "file": str(self.path),
            "from": self.source_format,
            "to": self.format,
            "family": self.family,
            "variants": dict(self.variants),
            "modules": dict(self.num_modules),
            "dtype": self.dtype,
            "rounding": self.rounding,
        }

    def text(self) -> str:
        """Returns lines for people."""
        modules = ", ".join(f"{count} in {part}" for part, count in self.num_modules.items())
        kept = "every number kept" if not self.rounding else f"rounded by {self.rounding:.2g} of their norm"
        return (
            f"Wrote {self.path} and read it back: equal.\n"
            f"{self.source_format} to {self.format}, {' and '.join(self.variants)} for {self.family}: "
            f"modules {modules}; {self.dtype}, {kept}."
        )


def convert(
    input_path: Path,
    output_path: Path,
    format_name: str,
    *,
    dtype: str = "auto",
    model_path: str | None = None,
    family_name: str | None = None,
    is_pickle: bool = False,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Conversion:
    """Writes an adapter in another spelling, with the same tensors, alphas and metadata.

    The kind of base, by which A1111 and Forge list files, is added to the metadata where it is missing, and zeros to a
    text encoder that diffusers would refuse.

    Args:
        input_path: adapter file, folder saved by PEFT, or checkpoint of a run.
        output_path: file, or folder if the format is one.
        format_name: spelling, or a program that reads it.
        dtype: fp32, fp16 or bf16; auto keeps that of the input.
        model_path: base whose modules give the names; needed only for networks of another build than the published.
        family_name: kind of base; without it, what the tensors tell.
        is_pickle: take the tensors out of a pickle, without running what is in it.
        embeddings: keep or drop text embeddings that are packed into the file.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or there is no such format or family.
        AdapterFileError: the file cannot be read, or does not fit the base.
        UnsupportedError: the format cannot hold this kind of adapter.
    """
    format_: Format = registry.find("formats", READERS.get(format_name, format_name))
    check_target(output_path, format_, overwrite)
    with as_safetensors(input_path) if is_pickle else _run_checkpoints.as_file(input_path) as path:
        source: Format = registry.find("formats", detect(path))
        if model_path is None:
            family, state = read_stored_alone(path, family_name)
            names = family.key_map(format_.name, None)
        else:
            family, state, names = _read_for(model_path, family_name, path, source, format_)
        state = replace(with_embeddings(state, embeddings), metadata=with_base(state.metadata, family.name))
        state = with_attention(state) if format_.name == "diffusers" else state
        kept = stored_dtype(path) if dtype == "auto" else None
        dtype = common_dtype([path]) if dtype == "auto" else dtype
        with dtype_named():
            written = write_exactly(state, names, format_, output_path, None if kept else find_dtype(dtype))
    return Conversion(
        output_path,
        "checkpoint" if _run_checkpoints.find(input_path) else source.name,
        format_.name,
        family.name,
        Counter(adapter.variant for _, adapter in state),
        Counter(key.part for key in state.modules),
        dtype,
        written.rounding,
    )


def _read_for(
    model_path: str, family_name: str | None, path: Path, source: Format, target: Format
) -> tuple[Family, AdapterState, KeyMap]:
    """Returns the family of a base, the adapter with the names of its modules, and those in the target format."""
    # Only now, since it takes seconds to import what builds a base.
    from lora_diffusion.adapters.state import check_fit, weight_shapes
    from lora_diffusion.workflows.checkpoints import find_weights

    model = find_weights(model_path, family_name)
    family: Family = registry.find("families", model.family)
    skeleton = family.skeleton(model)
    state = fit_dimensions(source.read_stored(path, family.key_map(source.name, model)), weight_shapes(skeleton))
    check_fit(state, skeleton, str(path))
    return family, state, family.key_map(target.name, model)
