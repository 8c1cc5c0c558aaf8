from __future__ import annotations

import io
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError, RunError
from lora_diffusion.data import images
from tests.data.conftest import INFO

_sides = st.integers(1, 5000)
_resolutions = st.sampled_from([(64, 8), (128, 64), (256, 16), (512, 8), (768, 64), (1024, 8)])


def _buckets(resolution: int, step: int) -> list[tuple[int, int]]:
    return images.bucket_sizes(resolution, BaseInfo(resolution, step, "", "epsilon", "test"))


@given(_sides, _sides, _resolutions)
def test_portrait_and_landscape_get_the_same_bucket_turned_round(width, height, base):
    buckets = _buckets(*base)
    chosen = images.choose_bucket((width, height), buckets)
    assert images.choose_bucket((height, width), buckets) in (chosen[::-1], chosen) and (
        width == height or images.choose_bucket((height, width), buckets) == chosen[::-1]
    )


@given(_sides, _sides, _resolutions)
def test_a_bucket_is_the_nearest_shape(width, height, base):
    buckets = _buckets(*base)
    chosen = images.choose_bucket((width, height), buckets)

    def distance(pair):
        return abs(math.log(pair[0] / pair[1]) - math.log(width / height))

    assert distance(chosen) <= min(min(distance(pair), distance(pair[::-1])) for pair in buckets) + 1e-9


@given(_resolutions)
def test_buckets_have_the_area_and_the_steps_that_were_asked_for(base):
    resolution, size_step = base
    step = 64 if resolution >= 512 else size_step
    buckets = _buckets(*base)
    assert (resolution, resolution) in buckets
    for width, height in buckets:
        assert width % step == 0 and height % step == 0 and height <= width <= 4 * height
        assert width * height <= resolution**2
        assert width * (height + step) > resolution**2 or (width + step) * height > resolution**2


def test_sdxl_gets_the_shapes_it_was_trained_on():
    buckets = _buckets(1024, 8)
    # Podell et al. 2023, arXiv 2307.01952, appendix I, those within an aspect of 4
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (2048, 512)} <= set(buckets)


@pytest.mark.parametrize(("resolution", "advice"), [(60, "56 or 64"), (4, "8 or 16"), (1000, "960 or 1024")])
def test_a_resolution_between_the_steps_is_refused(resolution, advice):
    with pytest.raises(ConfigError, match=f"data.resolution={resolution}.*{advice}"):
        images.bucket_sizes(resolution, INFO)


def test_crop_share_and_scale():
    assert images.crop_share((200, 100), (64, 64)) == pytest.approx(0.5)
    assert images.crop_share((128, 64), (128, 64)) == 0
    assert images.cover_scale((32, 64), (64, 64)) == 2


def _pixel(image: Image.Image, tmp_path, name="p.png", **options) -> tuple[int, ...]:
    image.save(tmp_path / name, **options)
    read = images.open_rgb(tmp_path / name)
    assert read.mode == "RGB"
    return read.getpixel((0, 0))


def test_transparent_images_get_a_white_ground(tmp_path):
    assert _pixel(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), tmp_path) == (255, 255, 255)
    assert _pixel(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), tmp_path) == pytest.approx((127, 127, 127), abs=1)
    assert _pixel(Image.new("LA", (4, 4), (0, 0)), tmp_path) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert _pixel(palette, tmp_path) == (10, 20, 30)
    assert _pixel(palette, tmp_path, transparency=0) == (255, 255, 255)


def test_sixteen_bits_of_grey_keep_their_brightness(tmp_path):
    levels = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert _pixel(levels, tmp_path) == (128, 128, 128)


def test_cmyk_becomes_rgb(tmp_path):
    assert _pixel(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), tmp_path, "p.jpg") == pytest.approx((255, 0, 0), abs=4)


def test_a_colour_profile_is_applied_and_a_damaged_one_ignored(tmp_path):
    lab_like = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    assert _pixel(grey, tmp_path, icc_profile=lab_like) == pytest.approx((100, 100, 100), abs=1)
    assert _pixel(grey, tmp_path, icc_profile=b"no profile") == (100, 100, 100)


def test_images_are_turned_upright(tmp_path):
    image = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.jpg", exif=exif)
    assert images.open_rgb(tmp_path / "p.jpg").size == (4, 8)


def test_what_is_written_about_an_image_does_not_keep_it_from_being_read(tmp_path):
    """Programs that make images write their workflow into them; Pillow refuses more than 1 MiB of it."""
    image, text = Image.new("RGB", (8, 4), "red"), PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 3_000_000, zip=True)
    text.add_itxt("prompt", "y" * 70_000_000)
    text.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    image.save(tmp_path / "p.png", pnginfo=text)
    assert images.open_rgb(tmp_path / "p.png").size == images.measure(tmp_path / "p.png") == (4, 8)
    assert images.open_rgb(tmp_path / "p.png").getpixel((0, 0)) == (255, 0, 0)
    data = (tmp_path / "p.png").read_bytes()
    end = data.index(b"IDAT") - 4  # the same texts behind the pixels
    late = data[:33] + data[end:-12] + data[33:end] + data[-12:]
    assert images.open_rgb(tmp_path / "late.png", late).size == (4, 8)


def test_damaged_exif_data_says_nothing(tmp_path, recwarn):
    damaged = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\xff\xff\xff\xff\x06"
    Image.new("RGB", (8, 4), "red").save(tmp_path / "p.jpg", exif=damaged)
    assert images.open_rgb(tmp_path / "p.jpg").size == (8, 4)
    assert not recwarn.list


@pytest.mark.parametrize("ending", ["jfif", "jpe", "avif", "tif", "tiff"])
def test_other_names_and_formats(tmp_path, ending):
    file_format = {"jfif": "jpeg", "jpe": "jpeg", "tif": "tiff"}.get(ending, ending)
    red = _pixel(Image.new("RGB", (16, 16), "red"), tmp_path, f"p.{ending}", format=file_format)
    assert red == pytest.approx((255, 0, 0), abs=3)
    assert f".{ending}" in images.ENDINGS


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(images.ImageError, match="is a pipe and no file"):
        images.measure(tmp_path / "p.png")
    with pytest.raises(images.ImageError, match="is a device and no file"):
        images.open_rgb(Path("/dev/zero"))
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name in ("loop.png", "gone.png"):
        with pytest.raises(images.ImageError, match=r"cannot be read .*rights or link"):
            images.open_rgb(tmp_path / name)
    Image.new("F", (4, 4)).save(tmp_path / "f.tif")
    with pytest.raises(images.ImageError, match="holds fractions"):
        images.measure(tmp_path / "f.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_strips_give_the_same_image(tmp_path, mode, monkeypatch):
    colors = np.random.default_rng(0).integers(0, 255, (31, 17, 4), np.uint8)
    colors = colors.view(np.uint16)[..., 0].copy() if mode == "I;16" else colors
    image = Image.fromarray(colors) if mode == "I;16" else Image.fromarray(colors).convert(mode)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "p.png", icc_profile=profile)
    whole, small = images.open_rgb(tmp_path / "p.png"), images.look(tmp_path / "p.png", 4)
    monkeypatch.setattr(images, "_STRIP_PIXELS", 60)
    assert images.open_rgb(tmp_path / "p.png").tobytes() == whole.tobytes()
    assert (
        images.look(tmp_path / "p.png", 4)
        == small
        == (whole.size, whole.resize((4, 4), Image.Resampling.BOX).tobytes())
    )


def test_giants_are_decoded_one_after_the_other(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "p.png")
    monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 2 * 1600)
    active, most, lock = [0], [0], threading.Lock()

    def slow(image):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        time.sleep(0.01)
        with lock:
            active[0] -= 1
        return image

    monkeypatch.setattr(images, "_upright", slow)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(images.measure, [tmp_path / "p.png"] * 24)) == {(40, 40)}
        assert most[0] == 2
        monkeypatch.setattr(images, "_PIXELS_AT_ONCE", 10)
        most[0] = 0
        assert set(pool.map(images.measure, [tmp_path / "p.png"] * 4)) == {(40, 40)}
        assert most[0] == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")])
def test_a_good_image_is_not_called_damaged_for_lack_of_memory(tmp_path, monkeypatch, error):
    Image.new("RGB", (40, 30)).save(tmp_path / "p.png")

    def fail(image):
        raise error

    monkeypatch.setattr(images, "_upright", fail)
    with pytest.raises(RunError, match=r"p\.png: there is not enough memory to decode 40 x 30 pixels"):
        images.measure(tmp_path / "p.png")


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    assert images.open_rgb(tmp_path / "p.gif").getpixel((0, 0)) == (255, 0, 0)


def test_any_damage_is_an_image_error(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8))
    rng = np.random.default_rng(1)
    for file_format in ("png", "jpeg", "webp", "avif", "tiff", "gif", "bmp"):
        buffer = io.BytesIO()
        noise.save(buffer, file_format)
        whole = np.frombuffer(buffer.getvalue(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 255, 4)
            path = tmp_path / f"p.{file_format}"
            path.write_bytes(damaged[: rng.integers(1, len(whole))].tobytes())
            try:
                images.open_rgb(path)
            except images.ImageError as error:
                assert str(path) in str(error)


def test_pixels_are_scaled_cropped_at_the_centre_and_mirrored(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (10, 0, 20, 20))
    image.paste("red", (0, 0, 10, 20))
    image.save(tmp_path / "p.png")
    single = images.load_pixels(tmp_path / "p.png", (20, 20), flip=False)
    assert single.shape == (1, 3, 20, 20) and str(single.dtype) == "torch.float32"
    assert single[0, :, 10, 2].tolist() == [1, 1, 1] and single[0, :, 10, 17].tolist() == [-1, -1, -1]
    both = images.load_pixels(tmp_path / "p.png", (20, 20), flip=True)
    assert both.shape == (2, 3, 20, 20)
    assert both[0].equal(single[0]) and both[1].flip(-1).equal(both[0])
