"""What can be said of an adapter file by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_diffusion.compat.inspect import FileReport, describe_file
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows import _run_checkpoints


def inspect(path: Path) -> FileReport:
    """Says what an adapter file, or a checkpoint of a run, is; needs no base model."""
    with _run_checkpoints.as_file(path) as file:
        report = describe_file(parse_file(file))
    return report if file == path else replace(report, path=str(path), format="checkpoint")
