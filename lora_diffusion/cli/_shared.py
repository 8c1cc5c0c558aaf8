"""What several commands share: printing a result, and values of the form FILE:WEIGHT."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ConfigError


def print_result(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Prints the result on stdout: as JSON if asked, else as text."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)


def set_up_logs(args: argparse.Namespace) -> None:
    """Starts logging; call it once the arguments are known to be right, since it loads rich."""
    from lora_diffusion.core import logs

    logs.set_up(args.debug)


def weighted_file(text: str) -> tuple[Path, float]:
    """Reads FILE or FILE:WEIGHT; the weight is 1 if it is left out.

    Raises:
        ConfigError: the weight is not a number, or there is no such file.
    """
    path, weight = Path(text), 1.0
    if not path.exists() and ":" in text:
        name, number = text.rsplit(":", 1)
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
            raise ConfigError(
                f"--adapter {text}: {number!r} is not a weight; write FILE:WEIGHT, say style.safetensors:0.8."
            )
        path, weight = Path(name), float(number)
    if not path.exists():
        raise ConfigError(f"--adapter {text}: there is no file {path}.")
    if (path / "config.yaml").is_file():
        files = ", ".join(str(file) for file in sorted(path.glob("*.safetensors"))) or "none yet"
        raise ConfigError(f"--adapter {text}: {path} is a run folder; give an adapter file of it: {files}.")
    return path, weight


def size(text: str) -> tuple[int, int]:
    """Reads WIDTHxHEIGHT in pixels."""
    match = re.fullmatch(r"0*(\d+)x0*(\d+)", text)
    if not match or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, say 512x768")
    return int(match[1]), int(match[2])
