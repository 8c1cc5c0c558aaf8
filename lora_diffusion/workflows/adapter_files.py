"""Work on adapter files; none of it loads a base model."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.core.device import find_dtype
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable
from lora_diffusion.core.protocols import Family, Format
from lora_diffusion.formats import FileReport, describe_file, detect
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.training.run_folder import RunFolder
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
    _check_target(output_path, format_, overwrite)
    state = read_adapter(source, family, config.model)
    key_map = family.key_map(format_name, config.model)
    return write_verified(state, key_map, format_, output_path, find_dtype(config.output.dtype))


def _check_target(path: Path, format_: Format, overwrite: bool) -> None:
    """Checks that writing an adapter to a path destroys nothing but an adapter."""
    check_writable(path.absolute().parent, "--output")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists; give another name or --overwrite.")
    if path.is_dir() and not format_.is_folder:
        raise ConfigError(f"--output {path} is a folder, and {format_.name} writes a file; name a file in it.")
    if path.is_dir() and any(path.iterdir()) and detect(path) != format_.name:
        raise ConfigError(f"--output {path} is a folder that holds something else; give another name.")


def inspect(path: Path) -> FileReport:
    """Says what an adapter file is; needs no base model."""
    return describe_file(path)
