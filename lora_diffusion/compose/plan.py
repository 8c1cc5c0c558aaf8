"""Adapter files with their weights, as they are written on the command line."""

from __future__ import annotations

import re
from pathlib import Path

from lora_diffusion.core.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def weighted_file(text: str, option: str = "--adapter") -> tuple[Path, float]:
    """Reads FILE or FILE:WEIGHT; the weight is 1 if it is left out.

    Raises:
        ConfigError: the weight is not a number, or there is no such file.
    """
    path, weight = Path(text), 1.0
    if not path.exists() and ":" in text:
        name, number = text.rsplit(":", 1)
        if not _NUMBER.fullmatch(number):
            if not Path(name).exists():  # the colon may be that of C:\loras
                raise ConfigError(f"{option} {text}: there is no file {path}.")
            raise ConfigError(
                f"{option} {text}: {number!r} is not a weight; write FILE:WEIGHT, say style.safetensors:0.8."
            )
        path, weight = Path(name), float(number)
    if not path.exists():
        raise ConfigError(f"{option} {text}: there is no file {path}.")
    if (path / "config.yaml").is_file():
        files = ", ".join(str(file) for file in sorted(path.glob("*.safetensors"))) or "none yet"
        raise ConfigError(f"{option} {text}: {path} is a run folder; give an adapter file of it: {files}.")
    return path, weight


def weighted_files(text: str, option: str = "--adapter") -> tuple[tuple[Path, float], ...]:
    """Reads one or more FILE:WEIGHT joined by +, which are used together.

    Raises:
        ConfigError: as `weighted_file`.
    """
    name, _, number = text.rpartition(":")
    is_one = Path(text).exists() or (_NUMBER.fullmatch(number) and Path(name).exists())
    parts = [text] if is_one else re.split(r"\+(?!\d+\.?\d*$)", text)
    return tuple(weighted_file(part, option) for part in parts)
