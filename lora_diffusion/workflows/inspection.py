"""What can be said of an adapter file by itself."""

from __future__ import annotations

from pathlib import Path

from lora_diffusion.core.tuning import one_thread
from lora_diffusion.formats import FileReport, describe_file


def inspect(path: Path) -> FileReport:
    """Says what an adapter file is; needs no base model."""
    with one_thread():
        return describe_file(path)
