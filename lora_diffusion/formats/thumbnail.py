"""A small picture as text, which model managers show beside an adapter."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.core.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LONGEST_SIDE = 256
"""Pixels."""
MOST_CHARACTERS = 64 * 2**10
"""Keeps the header far below the 1 MiB above which ComfyUI shows no metadata."""
_QUALITIES = (85, 70, 50, 30)


def data_url(path: Path) -> str:
    """Returns a picture as a data URL: JPEG, upright, at most LONGEST_SIDE pixels and MOST_CHARACTERS characters.

    Raises:
        DataError: it cannot be read as a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a picture ({error}); give a PNG, JPEG or WebP file.") from error
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    # Noise of this size takes 30,000 characters at the lowest quality.
    return next(url for quality in _QUALITIES if len(url := _encoded(picture, quality)) <= MOST_CHARACTERS)


def _encoded(picture: Picture, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
