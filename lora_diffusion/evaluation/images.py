"""Generated images on disk."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.core.samples import Output
from lora_diffusion.data.images import save_image


def save_output(output: Output, folder: Path, index: int) -> Path:
    """Writes one image as PNG, its settings as the `parameters` text that other tools show; returns the file."""
    request = output.request
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:48] or "empty"
    path = folder / f"{index:03d}-{slug}-seed{request.seed}.png"
    save_generated(output, path)
    return path


def save_generated(output: Output, path: Path) -> None:
    """Writes an image as PNG with its settings as the `parameters` text that other tools show."""
    request = output.request
    info = PngInfo()
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    info.add_text(
        "parameters",
        f"{request.prompt}{negative}\nSteps: {request.num_steps}, CFG scale: {request.guidance:g}, "
        f"Seed: {request.seed}, Size: {output.image.width}x{output.image.height}",
    )
    save_image(output.image, path, info)


def is_whole(path: Path) -> bool:
    """Says whether a PNG has all its bytes and they are as they were written; it is not decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises where a file ends, or a checksum is wrong
        return False
    return True
