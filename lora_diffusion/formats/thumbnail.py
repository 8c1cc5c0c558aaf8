"""A small picture as text, which model managers show beside an adapter."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

LONGEST_SIDE = 256
"""Pixels."""
MOST_CHARACTERS = 64 * 2**10
"""Keeps the header far below the 1 MiB above which ComfyUI shows no metadata."""
_QUALITIES = (85, 70, 50, 30)


def data_url(picture: Picture) -> str:
    """Returns an RGB picture, which is made small in place, as a data URL.

    It is a JPEG of at most LONGEST_SIDE pixels and MOST_CHARACTERS characters.
    """
    from PIL import Image

    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    # Noise of this size takes 30,000 characters at the lowest quality.
    return next(url for quality in _QUALITIES if len(url := _encoded(picture, quality)) <= MOST_CHARACTERS)


def _encoded(picture: Picture, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
