"""Reads a folder of pictures and captions, in the layouts that people already have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_diffusion.config.schema import PictureDataConfig
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import content_hash
from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.core.types import BaseInfo, ImageText
from lora_diffusion.data import captions, images, preflight
from lora_diffusion.data.folder import Folder, stop

_KOHYA = re.compile(r"(\d+)_(.*)")
_CAPTION_RULES = ("required", "optional")
_AUTO = "auto"
_MANY_REPEATS = 200
"""People ask for up to 100; beyond this the number is more likely a year or a count."""


def read(config: PictureDataConfig, info: BaseInfo) -> list[ImageText]:
    """Returns the samples of a folder, sorted by name, each with its captions and the size of its bucket.

    Every picture is decoded once, so that nothing fails later. Does not import torch, and never writes to the folder.

    Raises:
        ConfigError: a setting of `data` that this base cannot use.
        DataError: the folder cannot be used; all faults of its files are listed at once.
    """
    if config.captions not in _CAPTION_RULES:
        raise ConfigError(f"data.captions={config.captions} is unknown; use one of {', '.join(_CAPTION_RULES)}.")
    resolution = config.resolution or info.resolution
    buckets = images.bucket_sizes(resolution, info)
    if not config.buckets:
        buckets = [(resolution, resolution)]

    folder = preflight.list_pictures(config.path)
    faults: list[str] = []
    sizes = preflight.measure(folder, config.skip_bad, faults)
    num_unreadable = len(faults)
    pictures = list(sizes) if config.skip_bad and sizes else list(folder.files)
    repeats, class_words = _read_kohya_names(folder, pictures, faults)
    texts = _fill_captions(folder, pictures, class_words, config, faults)
    trigger, priors = _split_trigger(folder, texts, config.trigger, faults)
    stop(folder, "captions", faults, num_unreadable)

    samples = [
        ImageText(
            key=folder.name(path),
            path=path,
            captions=texts[path],
            prior_captions=priors.get(path, ()),
            trigger=trigger,
            num_repeats=repeats[path],
            size=size,
            original_size=sizes[path],
            crop=images.crop_margins(sizes[path], size),
        )
        for path in pictures
        for size in [images.choose_bucket(sizes[path], buckets)]
    ]
    _report(samples, sizes)
    return samples


def _read_kohya_names(
    folder: Folder, pictures: Sequence[Path], faults: list[str]
) -> tuple[dict[Path, int], dict[Path, str]]:
    """Returns the repeats of each picture and, in folders such as "10_sks dog", the words after the number."""
    repeats, words = dict.fromkeys(pictures, 1), {}
    folders: Counter[str] = Counter()
    for path in pictures:
        inner = path.relative_to(folder.root).parents
        match = next(filter(None, (_KOHYA.fullmatch(parent.name) for parent in inner)), None)
        if match:
            repeats[path], words[path] = int(match[1]), match[2].strip()
            folders[match[0]] += 1
    for name, count in folders.items():
        logger.info("Folder %s: each of its %d pictures is shown %s times an epoch.", name, count, name.split("_")[0])
        if int(name.split("_")[0]) == 0:
            faults.append(f"{name}: asks for 0 repeats; rename the folder to 1_... or move it away.")
        elif int(name.split("_")[0]) > _MANY_REPEATS:
            logger.warning("A number before _ asks for repeats: rename folder %s if it was meant otherwise.", name)
    return repeats, words


def _fill_captions(
    folder: Folder,
    pictures: Sequence[Path],
    class_words: Mapping[Path, str],
    config: PictureDataConfig,
    faults: list[str],
) -> dict[Path, captions.Lines]:
    """Returns at least one caption for each picture, or adds faults."""
    found = captions.collect(folder, faults)
    preflight.warn_of_orphans(folder, "caption", captions.ENDINGS)
    is_required = config.captions == "required"
    filled: dict[Path, captions.Lines] = {}
    missing = []
    for path in pictures:
        lines = found.get(path, ())
        fallback = class_words.get(path, "")
        if lines is None:
            continue
        if lines:
            filled[path] = lines
        elif is_required and path in found:
            faults.append(f"{folder.name(path)}: its caption is empty; write one, or set data.captions=optional.")
        elif fallback or not is_required:
            filled[path] = (fallback or " ".join(config.default_caption.split()),)
        else:
            missing.append(path)
    if missing:
        preflight.add_missing_captions(folder, missing, len(pictures), faults)
    return filled


def _split_trigger(
    folder: Folder, texts: Mapping[Path, captions.Lines], wanted: str, faults: list[str]
) -> tuple[str, dict[Path, captions.Lines]]:
    """Returns the trigger, and what the first caption of each picture is without it where that makes a difference."""
    is_found = wanted == _AUTO
    trigger = " ".join(wanted.split())
    if is_found:
        trigger = captions.find_trigger([text for lines in texts.values() for text in lines]) if len(texts) > 1 else ""
    if not trigger:
        return "", {}
    pattern = captions.words_pattern(trigger) if is_found else captions.phrase_pattern(trigger)
    for path, lines in texts.items():
        lacking = [text for text in lines if text and not pattern.search(text)]
        if lacking:
            faults.append(
                f'{folder.name(path)}: data.trigger="{trigger}" is not in its caption "{lacking[0]}"; '
                "add the words to the caption, or correct data.trigger."
            )
    if faults:  # a picture that cannot be read has no hash either
        return trigger, {}
    return trigger, {
        path: captions.priors(lines[0], pattern, content_hash(path), len(texts)) for path, lines in texts.items()
    }


def _report(samples: Sequence[ImageText], sizes: Mapping[Path, tuple[int, int]]) -> None:
    num_captions = sum(len(sample.captions) for sample in samples if any(sample.captions))
    trigger = f'the trigger is "{samples[0].trigger}"' if samples[0].trigger else "no trigger words"
    logger.info("Read %d pictures and %d captions; %s.", len(samples), num_captions, trigger)
    small = [sample.key for sample in samples if images.cover_scale(sizes[sample.path], sample.size) > 1]
    if small:
        logger.warning(
            "Pictures that are smaller than what they are trained at, and are scaled up: %d (%s).",
            len(small),
            name_some(small),
        )
