"""What a file made from other adapter files says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_diffusion.compose.linear import Sum
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.metadata import BASE, base_and_prediction

_OF_THE_BASE = (
    BASE,
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.predict_key",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
    "ss_base_model_version",
    "ss_clip_skip",
    "ss_resolution",
    "ss_sd_model_name",
    "ss_v2",
)
"""What is true of a sum if all adapters that tell it agree."""
_OUTDATED = ("modelspec.hash_sha256", "ss_network_args", "sshs_legacy_hash", "sshs_model_hash")
_TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class Source:
    """A file that went into another."""

    name: str
    """Of the file, without its folder."""
    sha256: str
    weights: Mapping[str, float]
    metadata: Mapping[str, str]


def check_one_base(sources: Sequence[Source]) -> None:
    """Checks that adapters were made for one architecture and prediction, as far as their metadata say.

    Raises:
        AdapterFileError: lists what they disagree about.
    """
    errors = []
    bases = {source.name: base_and_prediction(source.metadata) for source in sources}
    for index, what in enumerate(("base", "prediction")):
        named = {name: value for name, words in bases.items() if (value := words[index])}
        if len(set(named.values())) > 1:
            errors.append(f"{what}: " + ", ".join(f"{value} in {name}" for name, value in named.items()))
    if errors:
        raise AdapterFileError(
            "The adapters were made for different bases and cannot be added; take adapters of one architecture and "
            "prediction.",
            errors,
        )


def metadata(sources: Sequence[Source], total: Sum, name: str, written_at: float) -> dict[str, str]:
    """Returns the metadata of a file that holds a sum.

    One source alone keeps all that it told; of several, what holds for the base stays, and their triggers are joined.

    Args:
        sources: in the order of the sum.
        total: the sum.
        name: how users call the new adapter: its file name without ending.
        written_at: seconds since 1970.
    """
    if len(sources) == 1:
        kept = {key: value for key, value in sources[0].metadata.items() if key not in _OUTDATED}
    else:
        kept = _agreed(sources)
    triggers = dict.fromkeys(source.metadata[_TRIGGER] for source in sources if source.metadata.get(_TRIGGER))
    rank = max((adapter.rank for adapter in total.modules.values()), default=0)
    parts_of_sum: list[dict[str, Any]] = [
        {"file": source.name, "sha256": source.sha256, "weights": dict(source.weights)} for source in sources
    ]
    return {
        **kept,
        **({_TRIGGER: ", ".join(triggers)} if triggers else {}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_output_name": name,
        "modelspec.title": name,
        "modelspec.date": datetime.fromtimestamp(int(written_at)).isoformat(),
        "modelspec.merged_from": ", ".join(source.name for source in sources),
        "lora_diffusion.made_from": json.dumps(parts_of_sum),
        "lora_diffusion.relative_error": f"{total.error:.6g}",
    }


def _agreed(sources: Sequence[Source]) -> dict[str, str]:
    values_of = {key: {source.metadata[key] for source in sources if key in source.metadata} for key in _OF_THE_BASE}
    return {key: texts.pop() for key, texts in values_of.items() if len(texts) == 1}
