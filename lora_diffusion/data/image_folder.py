"""A folder of images and captions: reads it in the layouts that people already have, and describes what it holds."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_diffusion.config.schema import ImageDataConfig
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import content_hash
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import ImageText
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import caption_checks, captions, images, preflight
from lora_diffusion.data.anchors import Anchors
from lora_diffusion.data.folder import Folder, content_digest, stop
from lora_diffusion.data.trigger import SharedWords, Trigger, find, in_folder_name
from lora_diffusion.runtime.progress import watch

_KOHYA = re.compile(r"(\d{1,4})_(.*)")
_CAPTION_RULES = ("required", "optional")
_AUTO = "auto"
_MANY_REPEATS = 200
"""People ask for up to 100; beyond this the number is more likely a year or a count."""

_LONGEST_EXAMPLE = 200
"""Characters."""
_THUMBNAIL_SIDE = 16
_NEAR = 3.0
"""Root mean square difference of two thumbnails, in 1/255: what saving as JPEG or scaling an image changes at most."""
_ROWS = 512
_NUM_THREADS = 8


def read(config: ImageDataConfig, info: BaseInfo) -> list[ImageText]:
    """Returns the samples of a folder, sorted by name, each with its captions and the size of its bucket.

    Every image is decoded once, so that nothing fails later. Does not import torch, and never writes to the folder.

    Raises:
        ConfigError: a setting of `data` that this base cannot use.
        DataError: the folder cannot be used; all errors of its files are listed at once.
    """
    if config.captions not in _CAPTION_RULES:
        raise ConfigError(f"data.captions={config.captions} is unknown; use one of {', '.join(_CAPTION_RULES)}.")
    resolution = config.resolution or info.resolution
    buckets = images.bucket_sizes(resolution, info)
    if not config.buckets:
        buckets = [(resolution, resolution)]

    folder = preflight.list_images(config.path)
    errors: list[str] = []
    sizes = preflight.measure(folder, config.skip_bad, errors)
    num_unreadable = len(errors)
    image_paths = list(sizes) if config.skip_bad and sizes else list(folder.files)
    repeats, class_words = _read_kohya_names(folder, image_paths, errors)
    texts = _fill_captions(folder, image_paths, class_words, config, errors)
    trigger = _find_trigger(folder, texts, class_words, config.trigger, errors)
    caption_checks.check(folder, texts, trigger, info, config.flip, errors)
    stop(folder, "captions", errors, num_unreadable)
    kept = _kept(texts, trigger, info)

    samples = [
        ImageText(
            key=folder.name(path),
            path=path,
            captions=texts[path],
            **kept.get(path, {}),
            trigger=trigger.text,
            num_repeats=repeats[path],
            size=size,
            original_size=sizes[path],
            crop=images.crop_margins(sizes[path], size),
        )
        for path in image_paths
        for size in [images.choose_bucket(sizes[path], buckets)]
    ]
    _report(samples, sizes)
    return samples


def _read_kohya_names(
    folder: Folder, image_paths: Sequence[Path], errors: list[str]
) -> tuple[dict[Path, int], dict[Path, str]]:
    """Returns the repeats of each image and, in folders such as "10_sks dog", the words after the number."""
    repeats, words = dict.fromkeys(image_paths, 1), {}
    folders: Counter[str] = Counter()
    of_root = _kohya_name(folder.root.absolute()) or _kohya_name(folder.root.resolve())
    for path in image_paths:
        inner = [*path.relative_to(folder.root).parents][:-1]
        match = next(filter(None, map(_kohya_name, inner)), of_root)
        if match:
            repeats[path], words[path] = int(match[1]), match[2].strip()
            folders[match[0]] += 1
    for name, count in folders.items():
        logger.info("Folder %s: each of its %d images is shown %s times an epoch.", name, count, name.split("_")[0])
        if int(name.split("_")[0]) == 0:
            errors.append(f"{name}: asks for 0 repeats; rename the folder to 1_... or move it away.")
        elif int(name.split("_")[0]) > _MANY_REPEATS:
            logger.warning("A number before _ asks for repeats: rename folder %s if it was meant otherwise.", name)
    return repeats, words


def _kohya_name(folder: Path) -> re.Match[str] | None:
    """Returns the repeats and the words of a folder's name, as the user sees it; longer numbers are dates."""
    return _KOHYA.fullmatch(Path(os.path.normpath(folder)).name)


def _fill_captions(
    folder: Folder,
    image_paths: Sequence[Path],
    class_words: Mapping[Path, str],
    config: ImageDataConfig,
    errors: list[str],
) -> dict[Path, captions.Lines]:
    """Returns at least one caption for each image, or adds errors."""
    by_image = captions.collect(folder, errors, config.caption_lines)
    preflight.warn_of_orphans(folder, "caption", captions.ENDINGS)
    is_required = config.captions == "required"
    filled: dict[Path, captions.Lines] = {}
    missing = []
    for path in image_paths:
        lines = by_image.get(path, ())
        fallback = class_words.get(path, "")
        if lines is None:
            continue
        if lines:
            filled[path] = lines
        elif is_required and path in by_image:
            errors.append(f"{folder.name(path)}: its caption is empty; write one, or set data.captions=optional.")
        elif fallback or not is_required:
            filled[path] = (fallback or " ".join(config.default_caption.split()),)
        else:
            missing.append(path)
    if missing:
        preflight.add_missing_captions(folder, missing, len(image_paths), errors)
    return filled


def _find_trigger(
    folder: Folder,
    texts: Mapping[Path, captions.Lines],
    class_words: Mapping[Path, str],
    wanted: str,
    errors: list[str],
) -> Trigger:
    """Returns the words that are wanted, or those that are found, with a warning where others could be meant."""
    if wanted == _AUTO:
        every = [text for lines in texts.values() for text in lines]
        named = {class_words.get(path, "") for path in texts}
        shared = find(every) if len(texts) > 1 else SharedWords(Trigger())
        if shared.trigger.units and len(named) == 1:
            shared = shared._replace(trigger=in_folder_name(named.pop(), every) or shared.trigger, is_compound=False)
        caption_checks.warn_of_trigger(folder, texts, shared)
        return shared.trigger
    units = (" ".join(unit.split()) for unit in wanted.split(","))
    trigger = Trigger(tuple(filter(None, units)))
    words = trigger.text
    # The first one that lacks it is named.
    lacking = {
        path: text for path, lines in texts.items() for text in reversed(lines) if text and not trigger.is_in(text)
    }
    if len(lacking) > 1 and not any(map(trigger.is_in, (text for lines in texts.values() for text in lines))):
        errors.append(
            f'data.trigger="{words}" is in none of the {len(lacking)} captions, such as '
            f'"{shown(next(iter(lacking.values())))}"; add the words to the captions, or correct data.trigger.'
        )
        return trigger
    errors.extend(
        f'{folder.name(path)}: data.trigger="{words}" is not in its caption "{text}"; '
        "add the words to the caption, or correct data.trigger."
        for path, text in lacking.items()
    )
    return trigger


def _kept(texts: Mapping[Path, captions.Lines], trigger: Trigger, info: BaseInfo) -> dict[Path, dict[str, Any]]:
    """Returns what must keep its meaning, by the fields of ImageText, of each image's first caption."""
    if not trigger.units:
        return {}
    of_set = Anchors(trigger.text, len(texts), info.text_limit)
    kept = {}
    for path, (caption, *_) in texts.items():
        seed = content_hash(path)
        priors = captions.priors(caption, trigger.pattern, seed, len(texts))
        anchors = partial(of_set.of_image, caption=caption, priors=priors, seed=seed)
        kept[path] = {"prior_captions": priors, "anchors": anchors}
    return kept


def _report(samples: Sequence[ImageText], sizes: Mapping[Path, tuple[int, int]]) -> None:
    num_captions = sum(len(sample.captions) for sample in samples if any(sample.captions))
    trigger = f'the trigger is "{samples[0].trigger}"' if samples[0].trigger else "no trigger words"
    logger.info("Read %d images and %d captions; %s.", len(samples), num_captions, trigger)
    small = [sample.key for sample in samples if images.cover_scale(sizes[sample.path], sample.size) > 1]
    if small:
        logger.warning(
            "Images that are smaller than what they are trained at, and are scaled up: %d (%s).",
            len(small),
            name_some(small),
        )


@dataclass(frozen=True)
class ImageReport:
    """Facts about a data set. Images are named by their key."""

    num_pictures: int
    num_shown: int
    """Images in an epoch, repeats counted."""
    num_captions: int
    trigger: str
    prior_example: tuple[str, ...]
    """A caption, the same without the trigger, and with other words in its place."""
    buckets: dict[str, int]
    """"width x height" -> images, most frequent first."""
    largest_crop: tuple[str, float]
    """The image that loses most of its area to the crop, and that share."""
    num_upscaled: int
    duplicates: tuple[tuple[str, ...], ...]
    """Groups of files with equal bytes."""
    near_duplicates: tuple[tuple[str, str], ...]
    """Pairs that look the same though their bytes differ."""
    longest_caption: tuple[str, int]
    """The image with the longest caption, and that caption's words."""

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


def describe(samples: Sequence[ImageText]) -> ImageReport:
    """Looks at the images of samples that `read` returned.

    Args:
        samples: at least one.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        looks = list(watch(pool.map(_look, samples), len(samples), "Comparing images"))
    pairs = list(zip(samples, looks, strict=True))
    crops = [(sample.key, images.crop_share(look.size, sample.size)) for sample, look in pairs]
    lengths = [(sample.key, len(text.split())) for sample in samples for text in sample.captions]
    sizes = Counter(f"{sample.size[0]}x{sample.size[1]}" for sample in samples)
    priors = ((sample.captions[0], *sample.prior_captions[:2]) for sample in samples if sample.prior_captions)
    return ImageReport(
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


def _look(sample: ImageText) -> _Look:
    size, thumbnail = images.look(sample.path, _THUMBNAIL_SIDE, sample.read_bytes and sample.read_bytes())
    return _Look(size, content_digest(sample), thumbnail)


def _groups(pairs: Iterable[tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    groups = defaultdict(list)
    for value, name in pairs:
        groups[value].append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _look_alikes(pairs: Sequence[tuple[ImageText, _Look]]) -> tuple[tuple[str, str], ...]:
    thumbnails = np.stack([np.frombuffer(look.thumbnail, np.uint8) for _, look in pairs]).astype(np.float32)
    squares = (thumbnails**2).sum(1)
    alike = []
    for start in range(0, len(pairs), _ROWS):
        rows = slice(start, start + _ROWS)
        distances = squares[rows, None] + squares - 2 * thumbnails[rows] @ thumbnails.T
        for row, column in np.argwhere(distances <= thumbnails.shape[1] * _NEAR**2):
            first, second = start + int(row), int(column)
            if first < second and pairs[first][1].digest != pairs[second][1].digest:
                alike.append((pairs[first][0].key, pairs[second][0].key))
    return tuple(alike)
