"""Pictures as training sees them: upright sRGB, scaled and cropped to a bucket."""

from __future__ import annotations

import io
import math
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.types import BaseInfo

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Files with these endings are taken for pictures, in any case. Of animations the first frame is used."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_OPENING = threading.Lock()
_FINE_BUCKETS_FROM = 512


class PictureError(DataError):
    """A picture cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        """Keeps the reason by itself, for lists in which the file goes by another name."""
        self.reason = reason
        super().__init__(f"{path}: {reason}")


def open_rgb(path: Path, content: bytes | None = None) -> Image.Image:
    """Returns a picture decoded in full: upright, 8-bit RGB, sRGB colours, white where it was transparent.

    The content decides what kind of picture it is, not the ending of the name.

    Args:
        path: names the picture in messages, and is its file where no content is given.
        content: the bytes of a picture that lies in a table.

    Raises:
        PictureError: the file cannot be read.
    """
    try:
        with _open(path if content is None else io.BytesIO(content)) as image:
            return _flatten(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise PictureError(path, f"has too many pixels to be read safely ({error}); scale it down.") from error
    except UnidentifiedImageError as error:
        raise PictureError(path, _explain_unknown(path.stat().st_size if content is None else len(content))) from error
    except Exception as error:  # decoders raise what they like on damaged files; each means the same to the user
        reason = f"cannot be decoded ({getattr(error, 'strerror', None) or error})"
        raise PictureError(path, f"{reason}, it is damaged or cut off; replace it or move it away.") from error


def _open(source: Path | io.BytesIO) -> Image.Image:
    # Pillow warns about pictures of more than 89 million pixels and refuses twice that; the refusal is enough.
    # The lock is there because warning filters belong to the whole process.
    with _OPENING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(source, formats=_FORMATS)


def _explain_unknown(num_bytes: int) -> str:
    if num_bytes == 0:
        return "is empty (0 bytes); replace it or move it away."
    return "is no png, jpeg, webp, bmp or gif picture, whatever its name says; convert it or move it away."


def _flatten(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion clips all above 255 to white.
        image = Image.fromarray(np.clip(np.asarray(image) / 257 + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    flat = image if image.mode == "CMYK" else image.convert("RGB")
    if profile:
        try:
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(flat, io.BytesIO(profile), srgb, outputMode="RGB")
            return converted or flat
        except ImageCms.PyCMSError:
            pass  # a profile that is damaged or made for other channels says nothing about the colours
    return flat.convert("RGB")


def bucket_sizes(resolution: int, info: BaseInfo) -> list[tuple[int, int]]:
    """Returns the sizes (width, height) of landscape and square buckets; portrait ones are the same turned round.

    No bucket has more than resolution^2 pixels; sides lie between half and twice the resolution, in steps of 64 pixels
    from 512 on and of `info.size_step` below.

    Raises:
        ConfigError: the resolution is no multiple of that step.
    """
    step = math.lcm(64, info.size_step) if resolution >= _FINE_BUCKETS_FROM else info.size_step
    if resolution < step or resolution % step:
        below = max(resolution // step, 1) * step
        raise ConfigError(
            f"data.resolution={resolution} is no multiple of {step}, which {info.source} needs at this size; "
            f"use {below} or {below + step}."
        )
    longs = range(resolution, 2 * resolution + 1, step)
    shorts = range(-(-resolution // 2 // step) * step, resolution + 1, step)
    pairs = {(long, resolution**2 // long // step * step) for long in longs}
    pairs |= {(resolution**2 // short // step * step, short) for short in shorts if short}
    return sorted(pair for pair in pairs if 2 * pair[1] >= resolution and pair[0] <= 2 * resolution)


def choose_bucket(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the bucket whose shape is nearest to a picture's, measured on log(width / height).

    Args:
        size: width and height of the picture in pixels.
        sizes: as `bucket_sizes` gives them.
    """
    shape = math.log(max(size) / min(size))
    width, height = min(sizes, key=lambda pair: (abs(math.log(pair[0] / pair[1]) - shape), -pair[0] * pair[1]))
    return (width, height) if size[0] >= size[1] else (height, width)


def cover_scale(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Returns the factor by which a picture is scaled so that it covers its bucket."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def crop_share(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Returns the share of a picture's area, 0 to 1, that the crop to its bucket takes away."""
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * cover_scale(size, bucket) ** 2)


def crop_margins(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the pixels that `load_pixels` cuts off at the left, top, right and bottom of the scaled picture.

    Args:
        size: width and height of the picture in pixels.
        bucket: width and height of its bucket.

    >>> crop_margins((300, 100), (64, 64))
    (64, 0, 64, 0)
    """
    scale = cover_scale(size, bucket)
    across, down = (round((side * scale - kept) / 2) for side, kept in zip(size, bucket, strict=True))
    return across, down, across, down


def load_pixels(path: Path, size: tuple[int, int], flip: bool) -> Tensor:
    """Returns the picture scaled to cover `size` and cropped at the centre, with its mirror image if `flip`.

    Returns:
        [views, 3, height, width], float32 in -1..1; two views with flip.
    """
    import torch

    fitted = ImageOps.fit(open_rgb(path), size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1
    return torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])
