"""The difference of two bases as an adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.plan import plan
from lora_diffusion.algebra.lowrank import required_rank_rule
from lora_diffusion.compose import extract as extracting
from lora_diffusion.compose.extract import Extraction
from lora_diffusion.compose.linear import as_written
from lora_diffusion.config.schema import AdapterConfig, ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ModelError, UntrainableError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.privacy import public_path
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.core.text import name_some
from lora_diffusion.formats import metadata
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.workflows._adapter_files import check_target, dtype_named
from lora_diffusion.workflows.bases import open_base


@dataclass(frozen=True)
class ExtractResult:
    """What `extract` wrote."""

    path: Path
    extraction: Extraction
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        changes = self.extraction.changes
        others = self.extraction.others
        return {
            "file": str(self.path),
            "dtype": self.dtype,
            "modules": len(changes.modules),
            "equal_modules": self.extraction.num_equal,
            "relative_error": changes.error,
            "rounding": self.extraction.rounding,
            "errors": {f"{key.part}/{key.path}": changes.relative(key) for key in changes.modules},
            "ranks": {f"{key.part}/{key.path}": adapter.rank for key, adapter in changes.modules.items()},
            "not_held": None if others is None else list(others),
        }

    def text(self) -> str:
        """Returns lines for people."""
        changes = self.extraction.changes
        ranks = sorted(adapter.rank for adapter in changes.modules.values())
        lines = [
            f"Wrote {self.path} and read it back: equal. {len(ranks)} modules of rank {ranks[0]} to {ranks[-1]}, "
            f"{self.dtype}, relative error {changes.error:.2g} with the rounding to it; {self.extraction.num_equal} "
            "modules do not differ."
        ]
        lines += [f"  {key.part}/{key.path}: {changes.relative(key):.2g}" for key in changes.worst()]
        return "\n".join(lines)


def extract(
    base: ModelOptions,
    tuned: ModelOptions,
    output_path: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parts: Sequence[str] = (),
    targets: Sequence[str] = (),
    format_name: str = "kohya",
    dtype: str = "fp16",
    overwrite: bool = False,
) -> ExtractResult:
    """Writes the difference of two bases as an adapter.

    Args:
        base: what the adapter is to be used with.
        tuned: a fine-tuned model of the same family; may be laid out differently.
        output_path: file, or folder for peft.
        rank: of each module.
        energy: share of each module's squared norm to keep; given instead of a rank.
        parts: networks to look at; none takes all that the base holds.
        targets: as `adapter.targets`; none takes every group of the family.
        format_name: that of the file.
        dtype: fp32, fp16 or bf16.
        overwrite: replace what is there.

    Raises:
        InputError: a base or the output cannot be used, a target matches nothing, or nothing differs.
    """
    rule = required_rank_rule(rank, energy)
    format_: Format = registry.find("formats", format_name)
    check_target(output_path, format_, overwrite)
    if base.family != tuned.family:
        raise ModelError(f"{base.path} is of family {base.family}, {tuned.path} of {tuned.family}; give two of one.")
    family, before = open_base(base, "vae")
    _, after = open_base(tuned, "vae")
    networks = family.meta_modules(base)
    parts = tuple(parts or (part for part in family.parts if part in networks))
    groups = dict.fromkeys(group for name in parts if name in family.parts for group in family.parts[name].groups)
    adapter = AdapterConfig(rank=1, parts=parts, targets=tuple(targets or groups))
    modules = [module.key for module in plan(networks, family.parts, adapter).modules]
    extraction = extracting.extract(before, after, modules, rule, seed=0)
    extraction = replace(extraction, changes=as_written(extraction.changes, format_, find_dtype(dtype)))
    _warn_of_others(extraction, base, tuned)
    _warn_of_rounding(extraction, base, tuned)
    state = AdapterState(extraction.changes.modules)
    texts = _metadata(state, family, base, output_path.stem)
    sources = {
        "base": public_path(base.path),
        "tuned": public_path(tuned.path),
        "relative_error": extraction.changes.error,
    }
    state = replace(state, metadata={**texts, "lora_diffusion.extracted": json.dumps(sources)})
    with dtype_named():
        write_verified(state, family.key_map(format_name, base), format_, output_path, find_dtype(dtype))
    return ExtractResult(output_path, extraction, dtype)


def _metadata(state: AdapterState, family: Family, base: ModelOptions, name: str) -> dict[str, str]:
    """Returns the metadata of an extracted adapter; less is known of a base that is not whole."""
    try:
        info: BaseInfo = family.check(base)
    except UntrainableError:
        return metadata.with_base(
            {"modelspec.title": name, "ss_sd_model_name": Path(base.path).name}, family.architecture
        )
    return metadata.build(
        state,
        architecture=family.architecture,
        modelspec=info.architecture,
        name=name,
        written_at=time.time(),
        resolution=(info.resolution, info.resolution),
        prediction_type=info.prediction,
        training={"sd_model_name": Path(base.path).name},
    )


def _warn_of_others(extraction: Extraction, base: ModelOptions, tuned: ModelOptions) -> None:
    if extraction.others is None:
        logger.warning(
            "%s and %s are laid out differently, so only the weights of these modules were compared, not norms, "
            "biases and embeddings.",
            base.path,
            tuned.path,
        )
    elif extraction.others:
        logger.warning(
            "%d other tensor(s) differ too, which this adapter does not hold: %s",
            len(extraction.others),
            name_some(list(extraction.others)),
        )


def _warn_of_rounding(extraction: Extraction, base: ModelOptions, tuned: ModelOptions) -> None:
    if extraction.dtypes:
        logger.warning(
            "%s is stored in %s and %s in %s: rounding makes up to %.2g of the norm of the changes, and the adapter "
            "holds this noise too. Extract between copies of one dtype.",
            base.path,
            extraction.dtypes[0],
            tuned.path,
            extraction.dtypes[1],
            extraction.rounding,
        )
