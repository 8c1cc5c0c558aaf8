"""One HTML file that needs no other file and no network: its style, its script and its images are in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from lora_diffusion.core.files import write_text
from lora_diffusion.core.logs import logger

_SIDES = (512, 384, 288, 224, 160, 112)
"""Longest sides in pixels that images of a page may have; the largest that fits is taken."""
_PAGE_BYTES = 10_000_000
"""Images of a page, before base64 makes a third more of them: pages stay below 15 MB."""
_LOSSLESS_SIDE = 160


@dataclass(frozen=True)
class Shot:
    """An image on a page and what stands below it."""

    source: str
    """Key in the album."""
    label: str
    alt: str
    pair: str = ""
    """Shots of the same pair show the same prompt and seed; one of them may be the base's."""
    role: str = ""
    """base, chosen or ""."""


class Album:
    """The images of a page, each stored once for every size, as data URLs."""

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._images: dict[str, Image.Image | Path] = {}
        self._uses: dict[str, int] = {}
        self._urls: dict[str, str] = {}

    def add(self, key: str, image: Image.Image | Path) -> str:
        """Takes an image that the page shows, once for each time it is shown, and returns its key."""
        self._images.setdefault(key, image)
        self._uses[key] = self._uses.get(key, 0) + 1
        return key

    def develop(self) -> None:
        """Encodes all images at the largest size with which the page stays small."""
        for side in _SIDES:
            encoded = {key: _encode(_open(image), side) for key, image in self._images.items()}
            total = sum(len(content) * self._uses[key] for key, content in encoded.items())
            if total <= _PAGE_BYTES:
                break
        else:
            logger.warning("The images of the page have %d MB even at %d pixels.", total // 1_000_000, side)
        self._urls = {
            key: f"data:image/webp;base64,{base64.b64encode(content).decode()}" for key, content in encoded.items()
        }

    def url(self, key: str) -> str:
        """Returns the data URL of an image."""
        return self._urls[key]


def write_page(path: Path, template: str, album: Album, context: Mapping[str, Any]) -> None:
    """Renders a template of `templates/` and writes it atomically."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        loader=PackageLoader(__package__ or "", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    album.develop()
    html = environment.get_template(template).render(
        url=album.url, style=_asset("page.css"), script=_asset("page.js"), **context
    )
    write_text(path, html)


def _asset(name: str) -> str:
    return files(__package__ or "").joinpath("templates", name).read_text("utf-8")


def number(value: float | None, sign: str = "") -> str:
    """Returns three decimals with a true minus sign, or a dash where there is no number."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:{sign}.3f}".replace("-", "\N{MINUS SIGN}")


def _open(image: Image.Image | Path) -> Image.Image:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    return image.convert("RGB")


def _encode(image: Image.Image, side: int) -> bytes:
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # Lossy compression of small images shows once they are enlarged, and saves little.
    image.save(buffer, "WEBP", lossless=max(image.size) <= _LOSSLESS_SIDE, quality=82, method=4)
    return buffer.getvalue()
