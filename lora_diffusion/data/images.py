"""Images as training sees them: upright sRGB, scaled and cropped to a bucket."""

from __future__ import annotations

import io
import math
import struct
import textwrap
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError, DataError, RunError
from lora_diffusion.core.files import atomic_path, not_a_file
from lora_diffusion.core.samples import Output

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".tif", ".tiff", ".bmp", ".gif")
"""Files with these endings are taken for images, in any case. Of animations the first frame is used."""
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the image upright. CIPA DC-008 (Exif 2.32), section 4.6.5.1.10."""
_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
"""Length and type of a chunk of a PNG file, before its content."""
_CHECKSUM_BYTES = 4
_ORIENTED = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
"""Keywords of texts in which programs write EXIF data."""
_PIXELS_AT_ONCE = 100_000_000
_STRIP_PIXELS = 2**22
_BYTES_PER_PIXEL = 16
"""Most that a decoder and its image need."""
_FINE_BUCKETS_FROM = 512
_MIN_CELL_PIXELS = 128
_LABEL_PIXELS = 150

# Blocks of Pillow's usual 16 MiB stay with the thread that freed them; the C library gives back at once what is larger
# than 32 MiB. Without this four threads keep gigabytes after one giant each.
Image.core.set_block_size(2**26)  # type: ignore[attr-defined]  # Pillow offers it nowhere else


class ImageError(DataError):
    """An image cannot be read."""

    def __init__(self, path: Path, reason: str) -> None:
        """Keeps the reason by itself, for lists in which the file goes by another name."""
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class _DecodingLimit:
    """Lets threads decode images as long as these have few pixels together; a giant waits until it is alone."""

    def __init__(self) -> None:
        self._queue, self._freed, self._num_pixels = threading.Lock(), threading.Condition(), 0

    @contextmanager
    def of(self, num_pixels: int) -> Iterator[None]:
        """Waits until few pixels are decoded, and counts these among them; first come, first served."""
        with self._queue, self._freed:
            while self._num_pixels and self._num_pixels + num_pixels > _PIXELS_AT_ONCE:
                self._freed.wait()
            self._num_pixels += num_pixels
        try:
            yield
        finally:
            with self._freed:
                self._num_pixels -= num_pixels
                self._freed.notify()


_DECODING = _DecodingLimit()
_QUIET = threading.Lock()


def open_rgb(path: Path, content: bytes | None = None) -> Image.Image:
    """Returns an image decoded in full: upright, 8-bit RGB, sRGB colours, white where it was transparent.

    The content decides which image format it is, not the ending of the name.

    Args:
        path: names the image in messages, and is its file where no content is given.
        content: the bytes of an image that lies in a table.

    Raises:
        ImageError: the file cannot be read.
        RunError: there is not enough memory for it.
    """
    with _decoded(path, content) as image:
        return _flatten(image)


def measure(path: Path, content: bytes | None = None) -> tuple[int, int]:
    """Returns width and height of an image as it stands upright, once it was decoded in full; raises as `open_rgb`."""
    with _decoded(path, content) as image:
        return image.size


def look(path: Path, side: int, content: bytes | None = None) -> tuple[tuple[int, int], bytes]:
    """Returns width and height of an image, and its RGB bytes when scaled to a square; raises as `open_rgb`."""
    with _decoded(path, content) as image:
        return image.size, _flatten(image).resize((side, side), Image.Resampling.BOX).tobytes()


@contextmanager
def _decoded(path: Path, content: bytes | None) -> Iterator[Image.Image]:
    """Yields an image upright, its colours as they are stored; other threads wait while it needs much memory."""
    if content is None and (file_type := not_a_file(path)):
        raise ImageError(path, f"is {file_type} and no file; move it away.")
    size = (0, 0)
    try:
        with _stream(path, content) as stream, _open(stream) as image:
            size = image.size
            with _DECODING.of(math.prod(size)):
                image.load()
                if image.mode == "F":
                    raise ImageError(path, "holds fractions, not colours of 8 or 16 bits; convert it.")
                yield _upright(image)
    except Image.DecompressionBombError as error:
        raise ImageError(path, f"has too many pixels to be read safely ({error}); scale it down.") from error
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(path, _explain_unknown(path.stat().st_size if content is None else len(content))) from error
    except Exception as error:  # decoders raise what they like on damaged files; each means the same to the user
        if _lacks_memory(error, math.prod(size)):
            raise RunError(
                f"{path}: there is not enough memory to decode {size[0]} x {size[1]} pixels; close other programs, "
                "raise the limit of memory, or scale the image down."
            ) from error
        raise ImageError(path, _explain(error)) from error


def _stream(path: Path, content: bytes | None) -> BinaryIO:
    stream: BinaryIO = path.open("rb") if content is None else io.BytesIO(content)
    if stream.read(len(_PNG)) == _PNG:
        texts = list(_text_chunks(stream))
        stream.seek(0)
        if texts:
            with stream:
                data = bytearray(stream.read())
            for start, end in reversed(texts):
                del data[start:end]
            return io.BytesIO(data)
    stream.seek(0)
    return stream


def _text_chunks(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields where in a PNG file a text begins and ends, but for those that may hold its orientation.

    Programs that make images write how they did it; of more than 1 MiB Pillow refuses the image.

    Source: PNG specification (third edition), sections 5.3 and 11.3.3.
    """
    position = len(_PNG)
    while len(start := stream.read(_CHUNK.size + max(map(len, _ORIENTED)))) >= _CHUNK.size:
        length, chunk_type = _CHUNK.unpack_from(start)
        end = position + _CHUNK.size + length + _CHECKSUM_BYTES
        if chunk_type in (b"tEXt", b"zTXt", b"iTXt") and not start[_CHUNK.size :].startswith(_ORIENTED):
            yield position, end
        position = stream.seek(end)


def _open(stream: BinaryIO) -> Image.Image:
    # Pillow warns about images of more than 89 million pixels and refuses twice that; the refusal is enough.
    # The lock is there because warning filters belong to the whole process.
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(stream, formats=_FORMATS)


def _upright(image: Image.Image) -> Image.Image:
    """Returns an image turned as its EXIF data wants it; damaged data says nothing."""
    turn = None
    with _QUIET, warnings.catch_warnings(), suppress(Exception):
        warnings.simplefilter("ignore")
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def _lacks_memory(error: Exception, num_pixels: int) -> bool:
    """Says whether an image could not be decoded for lack of memory, which some decoders call an error of the file."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return True
    try:
        np.empty(num_pixels * _BYTES_PER_PIXEL, np.uint8)  # reserves without use
    except MemoryError:
        return True
    return False


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror}); correct its access rights or link."
    if isinstance(error, ValueError) and "MAX_TEXT_CHUNK" in str(error):
        return "holds a colour profile of more than 1 MiB; save it in sRGB colours."
    return f"cannot be decoded ({error}), it is damaged or cut off; replace it or move it away."


def _explain_unknown(num_bytes: int) -> str:
    if num_bytes == 0:
        return "is empty (0 bytes); replace it or move it away."
    formats = f"{', '.join(name.lower() for name in _FORMATS[:-1])} or {_FORMATS[-1].lower()}"
    return f"is no {formats} image, whatever its name says; convert it or move it away."


def _flatten(image: Image.Image) -> Image.Image:
    """Returns an image in RGB, made in strips, since giants in several modes at once take gigabytes."""
    to_srgb = _to_srgb(image)
    flat, rows = Image.new("RGB", image.size), max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        flat.paste(_flatten_strip(strip, to_srgb), (0, top))
    return flat


def _to_srgb(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    mode = image.mode if image.mode == "CMYK" else "RGB"
    try:
        return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, "RGB")
    except ImageCms.PyCMSError:
        return None  # a profile that is damaged or made for other channels says nothing about the colours


def _flatten_strip(image: Image.Image, to_srgb: ImageCms.ImageCmsTransform | None) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow's own conversion clips all above 255 to white.
        image = Image.fromarray(np.clip(np.asarray(image) / 257 + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    if to_srgb:
        return ImageCms.applyTransform(image if image.mode == "CMYK" else image.convert("RGB"), to_srgb) or image
    return image.convert("RGB")


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
    """Returns the bucket whose shape is nearest to an image's, measured on log(width / height).

    Args:
        size: width and height of the image in pixels.
        sizes: as `bucket_sizes` gives them.
    """
    shape = math.log(max(size) / min(size))
    width, height = min(sizes, key=lambda pair: (abs(math.log(pair[0] / pair[1]) - shape), -pair[0] * pair[1]))
    return (width, height) if size[0] >= size[1] else (height, width)


def cover_scale(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Returns the factor by which an image is scaled so that it covers its bucket."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def crop_share(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """Returns the share of an image's area, 0 to 1, that the crop to its bucket takes away."""
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * cover_scale(size, bucket) ** 2)


def crop_margins(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the pixels that `load_pixels` cuts off at the left, top, right and bottom of the scaled image.

    Args:
        size: width and height of the image in pixels.
        bucket: width and height of its bucket.

    >>> crop_margins((300, 100), (64, 64))
    (64, 0, 64, 0)
    """
    scale = cover_scale(size, bucket)
    across, down = (round((side * scale - kept) / 2) for side, kept in zip(size, bucket, strict=True))
    return across, down, across, down


def load_pixels(path: Path, size: tuple[int, int], flip: bool, content: bytes | None = None) -> Tensor:
    """Returns the image scaled to cover `size` and cropped at the centre, with its mirror image if `flip`.

    Args:
        path: as `open_rgb` takes it.
        size: width and height in pixels.
        flip: add the mirror image.
        content: as `open_rgb` takes it.

    Returns:
        [views, 3, height, width], float32 in -1..1; two views with flip.
    """
    import torch

    fitted = ImageOps.fit(open_rgb(path, content), size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1
    return torch.stack([pixels, pixels.flip(-1)] if flip else [pixels])


def save_image(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def output_grid(outputs: Sequence[Output], seeds: Sequence[int]) -> Image.Image:
    """Returns generated images in a table: one row for each prompt, one column for each seed."""
    rows = [outputs[start : start + len(seeds)] for start in range(0, len(outputs), len(seeds))]
    labels = [row[0].request.prompt for row in rows]
    return grid([[output.image for output in row] for row in rows], labels, [f"seed {seed}" for seed in seeds])


def grid(rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str]) -> Image.Image:
    """Returns images in a table with labels; small images are enlarged by whole factors.

    Args:
        rows: the same number of images in each row.
        row_labels: one for each row.
        column_labels: one for each column; empty for none.
    """
    width, height = rows[0][0].size
    scale = max(1, -(-_MIN_CELL_PIXELS // max(width, height)))
    cell_width, cell_height = width * scale, height * scale
    top = 28 if column_labels else 0
    sheet = Image.new("RGB", (_LABEL_PIXELS + cell_width * len(rows[0]), top + cell_height * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, label in enumerate(column_labels):
        draw.text((_LABEL_PIXELS + column * cell_width + 6, 6), label, "black", font)
    for row, (images, label) in enumerate(zip(rows, row_labels, strict=True)):
        wrapped = "\n".join(textwrap.wrap(label, 21))
        draw.multiline_text((6, top + row * cell_height + 8), wrapped, "black", font)
        for column, image in enumerate(images):
            enlarged = image.resize((cell_width, cell_height), Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (_LABEL_PIXELS + column * cell_width, top + row * cell_height))
    return sheet
