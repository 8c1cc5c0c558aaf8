"""Adapter files in another format; no base model is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.compat.pickled import as_safetensors
from lora_diffusion.core import registry
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.capabilities import READERS
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.metadata import with_base
from lora_diffusion.formats.normalize import with_attention
from lora_diffusion.formats.verified import write_exactly
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import (
    check_target,
    common_dtype,
    dtype_named,
    find_base,
    names_of,
    open_adapter,
    read_stored,
    stored_dtype,
    with_embeddings,
)


@dataclass(frozen=True)
class Conversion:
    """An adapter file in another format."""

    path: Path
    source_format: str
    format: str
    family: str
    variants: Mapping[str, int]
    """Variant -> number of modules."""
    num_modules: Mapping[str, int]
    """Part -> number of modules."""
    dtype: str
    rounding: float
    """Norm of what rounding to the dtype changed, relative to the norm of all tensors."""

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
    """Writes an adapter in another format, with the same tensors, alphas and metadata.

    The architecture of the base, by which A1111 and Forge list files, is added to the metadata where it is missing,
    and zeros to a text encoder that diffusers would refuse.

    Args:
        input_path: adapter file, folder saved by PEFT, or checkpoint of a run.
        output_path: file, or folder if the format is one.
        format_name: format, or a program that reads it.
        dtype: fp32, fp16 or bf16; auto keeps that of the input.
        model_path: base whose modules give the names; needed only for networks of another build than the published.
        family_name: family of the base; without it, the one that the tensors match.
        is_pickle: take the tensors out of a pickle, without running what is in it.
        embeddings: keep or drop text embeddings that are packed into the file.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or there is no such format or family.
        AdapterFileError: the file cannot be read, or does not fit the base.
        UnsupportedError: the format cannot hold this variant.
    """
    format_: Format = registry.find("formats", READERS.get(format_name, format_name))
    check_target(output_path, format_, overwrite)
    with as_safetensors(input_path) if is_pickle else _run_checkpoints.as_file(input_path) as path:
        file = open_adapter(path, input_path)
        source_format = detect(file)
        base = find_base(model_path, family_name)
        family, state = read_stored(file, base, family_name)
        state = replace(with_embeddings(state, embeddings), metadata=with_base(state.metadata, family.architecture))
        state = with_attention(state) if format_.name == "diffusers" else state
        kept = stored_dtype(file) if dtype == "auto" else None
        dtype = common_dtype([file]) if dtype == "auto" else dtype
        with dtype_named():
            written = write_exactly(
                state, names_of(family, format_.name, base), format_, output_path, None if kept else find_dtype(dtype)
            )
    return Conversion(
        output_path,
        "checkpoint" if _run_checkpoints.find(input_path) else source_format,
        format_.name,
        family.architecture.name,
        Counter(adapter.variant for _, adapter in state),
        Counter(key.part for key in state.modules),
        dtype,
        written.rounding,
    )
