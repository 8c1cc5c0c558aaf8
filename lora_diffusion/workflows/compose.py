"""Adapter files from adapter files; no base model is needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.algebra.lowrank import RankRule, rank_rule
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compose import record
from lora_diffusion.compose.interference import Overlap, overlaps
from lora_diffusion.compose.linear import Sum, Term, as_written, keys, part_weights, share_left
from lora_diffusion.compose.record import Source
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.core.protocols.method import Method
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.metadata import with_base
from lora_diffusion.formats.parsed_file import ParsedFile
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.autotune import one_thread
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.tensorfile.arrays import as_array, same_bits
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import (
    GivenBase,
    check_target,
    common_dtype,
    dtype_named,
    file_names,
    find_base,
    hash_adapter,
    names_of,
    open_adapter,
    read_alone,
)

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-4
"""Share of the adapters' size below which a sum is rounding."""


@dataclass(frozen=True)
class Composition:
    """An adapter file composed of others."""

    path: Path
    total: Sum
    dtype: str
    overlaps: tuple[Overlap, ...]
    missing: Mapping[str, int]
    """Adapter -> number of modules that others have and it lacks."""
    left: float
    """Size of the sum in terms of that of its adapters, 0 where they cancel each other."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "file": str(self.path),
            "dtype": self.dtype,
            "modules": len(self.total.modules),
            "largest_rank": max(adapter.rank for adapter in self.total.modules.values()),
            "relative_error": self.total.error,
            "errors": {_name(key): self.total.relative(key) for key in self.total.modules},
            "missing_modules": dict(self.missing),
            "share_left": self.left,
            "overlaps": [
                {
                    "adapters": [overlap.first, overlap.second],
                    "part": overlap.part,
                    "cosine": overlap.cosine,
                    "most": [
                        {"module": _name(meeting.key), "cosine": meeting.cosine, "share": meeting.share}
                        for meeting in overlap.most
                    ],
                }
                for overlap in self.overlaps
            ],
        }

    def text(self) -> str:
        """Returns lines for people."""
        ranks = sorted(adapter.rank for adapter in self.total.modules.values())
        lines = [
            f"Wrote {self.path} and read it back: equal. {len(ranks)} modules of rank {ranks[0]} to {ranks[-1]}, "
            f"{self.dtype}, relative error {self.total.error:.2g} with the rounding to it."
        ]
        lines += [f"  {_name(key)}: {self.total.relative(key):.2g}" for key in self.total.worst()]
        lines += ["Nothing is left of the adapters: they cancel each other."] if self.left < _NOTHING else []
        lines += [f"{name} does nothing in {count} of the modules." for name, count in self.missing.items() if count]
        for overlap in self.overlaps:
            lines.append(
                f"{overlap.first} and {overlap.second} in {overlap.part}: cosine {overlap.cosine:+.3f}; most in"
            )
            lines += [f"  {_name(meeting.key)}: {meeting.cosine:+.3f}" for meeting in overlap.most]
        return "\n".join(lines)


def compose(
    adapters: Sequence[tuple[Path, float | Mapping[str, float]]],
    output_path: Path,
    *,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "auto",
    model_path: str | None = None,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Composition:
    """Writes several adapter files as one, by default their weighted sum.

    In the kohya format, or that of the first if kohya has no names.

    Args:
        adapters: files or folders, each with one weight or one for each part.
        output_path: file, or folder where the format is one.
        method: name of a merge method.
        rank: of each module; without it and `energy` the sum is exact, so that ranks add up.
        energy: share of each module's squared norm to keep; given instead of a rank.
        dtype: fp32, fp16 or bf16; auto keeps that of the adapters, or fp32 where they differ.
        model_path: base whose modules give the names; needed only for networks of another build than the published.
        embeddings: keep or drop text embeddings that are packed into the files.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or a weight names no part.
        AdapterFileError: a file cannot be read, or the adapters are of different families.
        UnsupportedError: a variant that cannot be added like this.
    """
    rule = rank_rule(rank, energy)
    chosen: Method = registry.find("methods", method, "--method")
    with ExitStack() as opened:
        files = [open_adapter(opened.enter_context(_run_checkpoints.as_file(path))) for path, _ in adapters]
        weights = [weight for _, weight in adapters]
        return _compose(files, weights, output_path, chosen, rule, dtype, find_base(model_path), embeddings, overwrite)


def _compose(
    files: Sequence[ParsedFile],
    weights: Sequence[float | Mapping[str, float]],
    output_path: Path,
    method: Method,
    rule: RankRule | None,
    dtype: str,
    base: GivenBase | None,
    embeddings: str,
    overwrite: bool,
) -> Composition:
    families, states = zip(*(read_alone(file, base) for file in files), strict=True)
    format_: Format = registry.find("formats", _format_name(families[0], base, files[0]))
    check_target(output_path, format_, overwrite)
    names = file_names([file.path for file in files])
    terms = [
        Term(name, state, part_weights(state, weight, name))
        for name, state, weight in zip(names, states, weights, strict=True)
    ]
    sources = [source_of(file, term) for file, term in zip(files, terms, strict=True)]
    record.check_one_base(sources)
    if len({family.architecture.name for family in families}) > 1:
        pairs = [f"{name} is for {family.architecture.name}" for name, family in zip(names, families, strict=True)]
        raise AdapterFileError("The adapters were made for different bases and cannot be added.", pairs)
    dtype = common_dtype(files) if dtype == "auto" else dtype
    with one_thread():
        total = as_written(method.combine(terms, rule, kernels(families[0], base)), format_, find_dtype(dtype))
        pairs_overlap = overlaps(terms)
    packed = _joined_embeddings(terms) if embeddings == "keep" else {}
    metadata = record.metadata(sources, total, output_path.stem, time.time())
    write_sum(AdapterState(total.modules, metadata, packed), families[0], base, format_, output_path, dtype)
    left = share_left(terms, total)
    _warn_of_nothing(left)
    num_keys = len(keys(terms))
    missing = {term.name: num_keys - len(term.state.modules) for term in terms}
    return Composition(output_path, total, dtype, tuple(pairs_overlap), missing, left)


def _warn_of_nothing(left: float) -> None:
    if left < _NOTHING:
        logger.warning(
            "Nothing is left: at these weights the adapters cancel each other, and the file changes nothing."
        )


def _joined_embeddings(terms: Sequence[Term]) -> dict[str, Tensor]:
    """Returns the text embeddings of all adapters.

    Raises:
        AdapterFileError: two of one name differ.
    """
    joined: dict[str, Tensor] = {}
    for term in terms:
        for name, tensor in term.state.embeddings.items():
            if not same_bits(as_array(joined.setdefault(name, tensor)), as_array(tensor)):
                raise AdapterFileError(
                    f"{term.name} and another adapter hold different text embeddings of the name {name}; give "
                    "--embeddings drop, and load them from separate files."
                )
    return joined


def _format_name(family: Family, base: GivenBase | None, file: ParsedFile) -> str:
    try:
        names_of(family, "kohya", base)
    except UnsupportedError:
        return detect(file)
    return "kohya"


def _name(key: ModuleKey) -> str:
    return f"{key.part}/{key.path}"


def kernels(family: Family, base: GivenBase | None) -> dict[ModuleKey, tuple[int, ...]]:
    """Returns the sizes of the convolutions of a base, or of the one that a family published."""
    if base is not None:
        return base.kernels()
    if family.architecture.name not in DIFFUSION:
        return {}
    return {
        key: shape[2:] for key, shape in published_shapes(DIFFUSION[family.architecture.name]).items() if len(shape) > 2
    }


def source_of(file: ParsedFile, term: Term) -> Source:
    """Returns what a sum records of an adapter in it."""
    return Source(term.name, hash_adapter(file.path), term.weights, term.state.metadata)


def write_sum(
    state: AdapterState, family: Family, base: GivenBase | None, format_: Format, path: Path, dtype: str
) -> None:
    """Writes a sum with what programs list it by, and reads it back.

    Raises:
        ConfigError: a number does not fit the dtype.
        VerificationError: what was read back differs.
    """
    state = replace(state, metadata=with_base(state.metadata, family.architecture))
    key_map = names_of(family, format_.name, base)
    with dtype_named():
        write_verified(state, key_map, format_, path, find_dtype(dtype))
