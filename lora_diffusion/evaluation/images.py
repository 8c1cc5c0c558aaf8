"""Pictures on disk and side by side."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.core.files import atomic_path
from lora_diffusion.core.samples import Output

_MIN_CELL = 128
_LABEL_WIDTH = 150


def save_output(output: Output, folder: Path, index: int) -> Path:
    """Writes one picture as PNG, its settings as the `parameters` text that other tools show; returns the file."""
    request = output.request
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:48] or "empty"
    path = folder / f"{index:03d}-{slug}-seed{request.seed}.png"
    save_drawn(output, path)
    return path


def save_drawn(output: Output, path: Path) -> None:
    """Writes a picture as PNG with its settings as the `parameters` text that other tools show."""
    request = output.request
    info = PngInfo()
    negative = f"\nNegative prompt: {request.negative}" if request.negative else ""
    info.add_text(
        "parameters",
        f"{request.prompt}{negative}\nSteps: {request.num_steps}, CFG scale: {request.guidance:g}, "
        f"Seed: {request.seed}, Size: {output.image.width}x{output.image.height}",
    )
    save_image(output.image, path, info)


def save_image(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def is_whole(path: Path) -> bool:
    """Says whether a PNG has all its bytes and they are as they were written; it is not decoded."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises where a file ends, or a checksum is wrong
        return False
    return True


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Returns pictures in a table with labels; small pictures are enlarged by whole factors.

    Args:
        rows: the same number of pictures in each row.
        row_labels: one for each row.
        column_labels: one for each column; empty for none.
    """
    width, height = rows[0][0].size
    scale = max(1, -(-_MIN_CELL // max(width, height)))
    cell_width, cell_height = width * scale, height * scale
    top = 28 if column_labels else 0
    sheet = Image.new("RGB", (_LABEL_WIDTH + cell_width * len(rows[0]), top + cell_height * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, label in enumerate(column_labels):
        draw.text((_LABEL_WIDTH + column * cell_width + 6, 6), label, "black", font)
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        wrapped = "\n".join(textwrap.wrap(label, 21))
        draw.multiline_text((6, top + row * cell_height + 8), wrapped, "black", font)
        for column, image in enumerate(images):
            enlarged = image.resize((cell_width, cell_height), Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (_LABEL_WIDTH + column * cell_width, top + row * cell_height))
    return sheet
