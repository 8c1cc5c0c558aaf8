"""Pictures with captions, as a kind of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_diffusion.config.schema import PictureDataConfig, PreviewConfig
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.files import content_hash
from lora_diffusion.core.samples import ImageText, Request
from lora_diffusion.data import images, report, sources

_BATCH_PIXELS = 1024**2
_BATCH_SAMPLES = 16


class _Pictures:
    """See `data.kinds.Kind` for what each method must do."""

    noun = "pictures"

    def read(self, config: PictureDataConfig, info: BaseInfo) -> list[ImageText]:
        """Reads the folder with `sources.read`."""
        return sources.read(config, info)

    def identity(self, sample: ImageText, config: PictureDataConfig) -> list[Any]:
        """Names the picture by its bytes, and how it is scaled, cropped and captioned."""
        return [*self.view_identity(sample, config), *self.text_identity(sample)]

    def view_identity(self, sample: ImageText, config: PictureDataConfig) -> list[Any]:
        """Names the picture by its bytes, and how it is scaled and cropped."""
        return [content_hash(sample.path), sample.size, sample.original_size, sample.crop, config.flip]

    def text_identity(self, sample: ImageText) -> list[Any]:
        """Names the captions."""
        return [sample.captions, sample.prior_captions]

    def open(self, sample: ImageText, config: PictureDataConfig) -> ImageText:
        """Decodes the picture, scaled and cropped to its bucket."""
        return replace(sample, pixels=images.load_pixels(sample.path, sample.size, config.flip))

    def group(self, sample: ImageText) -> str:
        """Names the bucket."""
        return f"{sample.size[0]}x{sample.size[1]}"

    def num_at_once(self, sample: ImageText, config: PictureDataConfig) -> int:
        """Limits the pixels of all views together."""
        width, height = sample.size
        return min(max(_BATCH_PIXELS // (width * height * (1 + config.flip)), 1), _BATCH_SAMPLES)

    def describe(self, samples: Sequence[ImageText]) -> report.DataReport:
        """Compares the pictures with `report.describe`."""
        return report.describe(samples)

    def largest(self, samples: Sequence[ImageText]) -> tuple[int, int]:
        """Gives width and height in pixels."""
        return max((sample.size for sample in samples), key=lambda size: size[0] * size[1])

    def previews(self, samples: Sequence[ImageText], config: PreviewConfig) -> list[Request]:
        """Asks for the prompts, or for the first captions, with each seed."""
        prompts = config.prompts or tuple(dict.fromkeys(sample.captions[0] for sample in samples))[:4]
        return [
            Request(prompt, seed, config.negative, config.num_steps, config.guidance)
            for prompt in prompts
            for seed in config.seeds
        ]

    def metadata(self, samples: Sequence[ImageText], config: PictureDataConfig) -> dict[str, Any]:
        """Tells size, mirroring and buckets."""
        width, height = samples[0].size
        return {
            "flip_aug": config.flip,
            **dict.fromkeys(("color_aug", "random_crop", "shuffle_caption"), False),
            "num_reg_images": 0,
            "enable_bucket": config.buckets,
            "bucket_info": _buckets(samples) if config.buckets else None,
            "resolution": f"({width}, {height})",
        }

    def headline(self, samples: Sequence[ImageText]) -> dict[str, Any]:
        """Gives the size of the first picture, and the trigger words."""
        return {"resolution": samples[0].size, "trigger": samples[0].trigger}

    def texts(self, sample: ImageText) -> tuple[str, ...]:
        """Gives the captions."""
        return sample.captions


def _buckets(samples: Sequence[ImageText]) -> dict[str, Any]:
    """Returns kohya's record of how many pictures each size has, repeats counted, and how far their shapes are off."""
    counts: Counter[tuple[int, int]] = Counter()
    errors = []
    for sample in samples:
        counts[sample.size] += sample.num_repeats
        (width, height), (own_width, own_height) = sample.size, sample.original_size
        errors.append(abs(own_width / own_height - width / height))
    sizes = sorted(counts)
    buckets = {str(index): {"resolution": list(size), "count": counts[size]} for index, size in enumerate(sizes)}
    return {"buckets": buckets, "mean_img_ar_error": sum(errors) / len(errors)}


KIND = _Pictures()
