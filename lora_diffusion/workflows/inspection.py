"""What can be said of an adapter file by itself."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.formats import FileReport, describe_file


def inspect(path: Path) -> FileReport:
    """Says what an adapter file is; needs no base model."""
    return describe_file(path)
