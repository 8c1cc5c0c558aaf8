"""Samples that are held out: what a run is scored on while it trains, and is not trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import user_path
from lora_diffusion.core.samples import Sample
from lora_diffusion.data.folder import content_digest
from lora_diffusion.data.sample_types import SampleType
from lora_diffusion.data.sources import ALL_SPLITS

_Sample = TypeVar("_Sample", bound=Sample)
_LARGEST_SHARE = 0.5


def hold_out(
    sample_type: SampleType, config: Any, info: BaseInfo, samples: Sequence[Sample]
) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Returns the samples to train on, and those that `data.validation`, which is set, holds out.

    Args:
        sample_type: reads other data.
        config: the `data:` section; its `validation` is a share, a folder or file, or the name of a split of data.path.
        info: of the base.
        samples: what `sample_type` read of data.path.

    Raises:
        ConfigError: no such share, folder or split, or too few samples to hold any out.
        DataError: the other data cannot be used.
    """
    wanted = config.validation
    if (share := _share(wanted)) is not None:
        return split(samples, share)
    path = user_path(wanted, "data.validation")
    if path.exists():
        held_out = sample_type.read(replace(config, path=wanted, split=ALL_SPLITS), info)
    else:
        held_out = sample_type.read(replace(config, split=wanted), info)
    trained = {(sample.path, sample.key) for sample in samples}
    if shared := [sample.key for sample in held_out if (sample.path, sample.key) in trained]:
        raise ConfigError(
            f"data.validation={wanted}: {len(shared)} of its {len(held_out)} samples are trained on as well, say "
            f"{shared[0]}; take them out of data.path, or name other data."
        )
    return samples, held_out


def split(samples: Sequence[_Sample], share: float) -> tuple[list[_Sample], list[_Sample]]:
    """Returns the samples to train on, and about a share of them that is held out.

    Content decides which, not order or name; samples of one file or of equal files are on one side.

    Raises:
        ConfigError: nothing would be left on one side.
    """
    contents = [_content(sample) for sample in samples]
    ranks = sorted(set(contents))
    held_out = frozenset(ranks[: max(1, round(share * len(ranks)))])
    if len(held_out) == len(ranks):
        raise ConfigError(
            f"data.validation={share:g}: the data holds one recording or image only, so nothing can be held out; "
            "drop data.validation, or name other data."
        )
    pairs = list(zip(samples, contents, strict=True))
    trained = [sample for sample, content in pairs if content not in held_out]
    return trained, [sample for sample, content in pairs if content in held_out]


def _content(sample: Any) -> str:
    """Returns a hash of the recording of a sample, or of its first image; of its name where it has neither."""
    for file in getattr(sample, "images", (sample,)):
        return content_digest(file)
    return hashlib.sha256(sample.key.encode()).hexdigest()


def _share(text: str) -> float | None:
    """Returns the share that a text gives, or None if it is no number.

    Raises:
        ConfigError: a number that is no share.
    """
    try:
        share = float(text)
    except ValueError:
        return None
    if not 0 < share <= _LARGEST_SHARE:
        raise ConfigError(
            f"data.validation={text}: a share must be greater than 0 and at most {_LARGEST_SHARE:g}, say 0.1; a folder "
            "of that name is written with ./ before it."
        )
    return share
