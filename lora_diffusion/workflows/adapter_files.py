"""Work on adapter files; none of it loads a base model."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.core.device import find_dtype
from lora_diffusion.core.protocols import Family, Format
from lora_diffusion.formats import FileReport, describe_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows._files import check_target
from lora_diffusion.workflows._steps import read_adapter


def export(run_path: Path, format_name: str, output_path: Path, *, overwrite: bool = False) -> Path:
    """Writes the adapter of a finished run in a format, and reads it back.

    Raises:
        ConfigError: no run, no adapter in it, or the output exists and is not to be, or must not be, replaced.
    """
    run = RunFolder(run_path)
    config = run.config()
    family: Family = registry.find("families", config.model.family)
    format_: Format = registry.find("formats", format_name)
    source = run.find_adapter(config)
    check_target(output_path, format_, overwrite)
    state = read_adapter(source, family, config.model)
    key_map = family.key_map(format_name, config.model)
    return write_verified(state, key_map, format_, output_path, find_dtype(config.output.dtype))


def inspect(path: Path) -> FileReport:
    """Says what an adapter file is; needs no base model."""
    return describe_file(path)
