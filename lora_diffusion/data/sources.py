"""Reads a folder of pictures and captions, in the layouts that people already have."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_diffusion.config.schema import PictureDataConfig
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import content_hash
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import ImageText
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data import caption_checks, captions, images, preflight
from lora_diffusion.data.folder import Folder, stop
from lora_diffusion.data.trigger import Found, Trigger, find, in_folder_name

_KOHYA = re.compile(r"(\d{1,4})_(.*)")
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
    trigger = _find_trigger(folder, texts, class_words, config.trigger, faults)
    caption_checks.check(folder, texts, trigger, info, config.flip, faults)
    priors = {} if faults else _priors(texts, trigger)  # a picture that cannot be read has no hash either
    stop(folder, "captions", faults, num_unreadable)

    samples = [
        ImageText(
            key=folder.name(path),
            path=path,
            captions=texts[path],
            prior_captions=priors.get(path, ()),
            trigger=trigger.text,
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
    of_root = _kohya_name(folder.root.absolute()) or _kohya_name(folder.root.resolve())
    for path in pictures:
        inner = [*path.relative_to(folder.root).parents][:-1]
        match = next(filter(None, map(_kohya_name, inner)), of_root)
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


def _kohya_name(folder: Path) -> re.Match[str] | None:
    """Returns the repeats and the words of a folder's name, as the user sees it; longer numbers are dates."""
    return _KOHYA.fullmatch(Path(os.path.normpath(folder)).name)


def _fill_captions(
    folder: Folder,
    pictures: Sequence[Path],
    class_words: Mapping[Path, str],
    config: PictureDataConfig,
    faults: list[str],
) -> dict[Path, captions.Lines]:
    """Returns at least one caption for each picture, or adds faults."""
    found = captions.collect(folder, faults, config.caption_lines)
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


def _find_trigger(
    folder: Folder,
    texts: Mapping[Path, captions.Lines],
    class_words: Mapping[Path, str],
    wanted: str,
    faults: list[str],
) -> Trigger:
    """Returns the words that are wanted, or those that are found, with a warning where others could be meant."""
    if wanted == _AUTO:
        every = [text for lines in texts.values() for text in lines]
        named = {class_words.get(path, "") for path in texts}
        found = find(every) if len(texts) > 1 else Found(Trigger())
        if found.trigger.units and len(named) == 1:
            found = found._replace(trigger=in_folder_name(named.pop(), every) or found.trigger, is_doubtful=False)
        caption_checks.warn_of_trigger(folder, texts, found)
        return found.trigger
    units = (" ".join(unit.split()) for unit in wanted.split(","))
    trigger = Trigger(tuple(filter(None, units)))
    words = trigger.text
    # The first one that lacks it is named.
    lacking = {
        path: text for path, lines in texts.items() for text in reversed(lines) if text and not trigger.is_in(text)
    }
    if len(lacking) > 1 and not any(map(trigger.is_in, (text for lines in texts.values() for text in lines))):
        faults.append(
            f'data.trigger="{words}" is in none of the {len(lacking)} captions, such as '
            f'"{shown(next(iter(lacking.values())))}"; add the words to the captions, or correct data.trigger.'
        )
        return trigger
    faults.extend(
        f'{folder.name(path)}: data.trigger="{words}" is not in its caption "{text}"; '
        "add the words to the caption, or correct data.trigger."
        for path, text in lacking.items()
    )
    return trigger


def _priors(texts: Mapping[Path, captions.Lines], trigger: Trigger) -> dict[Path, captions.Lines]:
    """Returns what the first caption of each picture is without the trigger where that makes a difference."""
    if not trigger.units:
        return {}
    return {
        path: captions.priors(lines[0], trigger.pattern, content_hash(path), len(texts))
        for path, lines in texts.items()
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
