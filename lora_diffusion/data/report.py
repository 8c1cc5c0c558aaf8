"""What a data set holds, told before anything is trained on it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_diffusion.core.files import content_hash
from lora_diffusion.core.samples import ImageText
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import images
from lora_diffusion.runtime.progress import watch

_LONGEST_EXAMPLE = 200
"""Characters."""
_THUMBNAIL_SIDE = 16
_NEAR = 3.0
"""Root mean square difference of two thumbnails, in 1/255: what saving as JPEG or scaling a picture changes at most."""
_ROWS = 512
_NUM_THREADS = 8


@dataclass(frozen=True)
class DataReport:
    """Facts about a data set. Pictures are named by their key."""

    num_pictures: int
    num_shown: int
    """Pictures in an epoch, repeats counted."""
    num_captions: int
    trigger: str
    prior_example: tuple[str, ...]
    """A caption, the same without the trigger, and with other words in its place."""
    buckets: dict[str, int]
    """"width x height" -> pictures, most frequent first."""
    largest_crop: tuple[str, float]
    """The picture that loses most of its area to the crop, and that share."""
    num_upscaled: int
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files with equal bytes."""
    near_duplicates: tuple[tuple[str, str], ...]
    """Pairs that look the same though their bytes differ."""
    longest_caption: tuple[str, int]
    """The picture with the longest caption, and that caption's words."""

    def lines(self) -> list[str]:
        """Returns the report as lines of plain text."""
        buckets = ", ".join(f"{size} ({count})" for size, count in self.buckets.items())
        lines = [
            f"Pictures:     {self.num_pictures}, {self.num_shown} shown in an epoch",
            f"Captions:     {self.num_captions}, the longest has {self.longest_caption[1]} words "
            f"({self.longest_caption[0]})",
            f"Trigger:      {self.trigger or 'none'}",
        ]
        if self.prior_example:
            caption, *priors = (f'"{shown(text, _LONGEST_EXAMPLE)}"' for text in self.prior_example)
            lines.append(f"Without it:   {caption} becomes {' or '.join(priors)}")
        lines += [
            f"Buckets:      {buckets}",
            f"Largest crop: {self.largest_crop[1]:.0%} of {self.largest_crop[0]}",
            f"Scaled up:    {self.num_upscaled}",
        ]
        if self.duplicates:
            lines.append(f"Equal files:  {name_some([' = '.join(group) for group in self.duplicates], 10)}")
        if self.near_duplicates:
            lines.append(f"Look alike:   {name_some([' ~ '.join(pair) for pair in self.near_duplicates], 10)}")
        return lines


@dataclass(frozen=True)
class _Look:
    size: tuple[int, int]
    digest: str
    thumbnail: bytes


def describe(samples: Sequence[ImageText]) -> DataReport:
    """Looks at the pictures of samples that `sources.read` returned.

    Args:
        samples: at least one.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        paths = [sample.path for sample in samples]
        looks = list(watch(pool.map(_look, paths), len(paths), "Comparing pictures"))
    pairs = list(zip(samples, looks, strict=True))
    crops = [(sample.key, images.crop_share(look.size, sample.size)) for sample, look in pairs]
    lengths = [(sample.key, len(text.split())) for sample in samples for text in sample.captions]
    sizes = Counter(f"{sample.size[0]}x{sample.size[1]}" for sample in samples)
    priors = ((sample.captions[0], *sample.prior_captions[:2]) for sample in samples if sample.prior_captions)
    return DataReport(
        num_pictures=len(samples),
        num_shown=sum(sample.num_repeats for sample in samples),
        num_captions=sum(bool(text) for sample in samples for text in sample.captions),
        trigger=samples[0].trigger,
        prior_example=next(priors, ()),
        buckets=dict(sizes.most_common()),
        largest_crop=max(crops, key=lambda crop: crop[1]),
        num_upscaled=sum(images.cover_scale(look.size, sample.size) > 1 for sample, look in pairs),
        duplicates=_groups((look.digest, sample.key) for sample, look in pairs),
        near_duplicates=_look_alikes(pairs),
        longest_caption=max(lengths, key=lambda length: length[1]),
    )


def _look(path: Path) -> _Look:
    size, thumbnail = images.look(path, _THUMBNAIL_SIDE)
    return _Look(size, content_hash(path), thumbnail)


def _groups(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    groups = defaultdict(list)
    for value, name in pairs:
        groups[value].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _look_alikes(pairs: Sequence[tuple[ImageText, _Look]]) -> tuple[tuple[str, str], ...]:
    thumbnails = np.stack([np.frombuffer(look.thumbnail, np.uint8) for _, look in pairs]).astype(np.float32)
    squares = (thumbnails**2).sum(1)
    found = []
    for start in range(0, len(pairs), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squares[rows, None] + squares - 2 * thumbnails[rows] @ thumbnails.T
        for row, column in np.argwhere(distances <= thumbnails.shape[1] * _NEAR**2):
            first, second = start + int(row), int(column)
            if first < second and pairs[first][1].digest != pairs[second][1].digest:
                found.append((pairs[first][0].key, pairs[second][0].key))
    return tuple(found)
