"""The whole way on a built-in base, once for each task: train, compare before and after, report."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from lora_diffusion.core.result import Result

NAMES = ("style", "whisper", "llava")
"""Each is a file here, imported only when it is run."""


def quickstart(name: str, output_path: Path, *, resume: bool = False, overwrite: bool = False) -> Result:
    """Runs the quickstart of that name.

    Args:
        name: one of NAMES.
        output_path: run folder.
        resume: continue an earlier run there; a finished one is only scored again.
        overwrite: replace an earlier run there.

    Raises:
        ConfigError: the folder holds another run, and neither `resume` nor `overwrite` is set.
    """
    result: Result = import_module(f"{__name__}.{name}").quickstart(output_path, resume=resume, overwrite=overwrite)
    return result
