"""Adapter files made from adapter files; no base model is needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.algebra.lowrank import RankRule, rank_rule, required_rank_rule
from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compose import record
from lora_diffusion.compose.interference import Overlap, overlaps
from lora_diffusion.compose.linear import Sum, Term, add, as_written, keys, part_weights, share_left
from lora_diffusion.compose.record import Source
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleKey
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.metadata import with_base
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.autotune import one_thread
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.tensorfile.arrays import as_array, same_bits
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._files import (
    GivenBase,
    check_target,
    common_dtype,
    dtype_named,
    file_names,
    find_base,
    hash_adapter,
    names_of,
    read_alone,
)

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-4
"""Share of the adapters' size below which a sum is rounding."""


@dataclass(frozen=True)
class Composition:
    """An adapter file made from others."""

    path: Path
    made: Sum
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
            "modules": len(self.made.modules),
            "largest_rank": max(adapter.rank for adapter in self.made.modules.values()),
            "relative_error": self.made.error,
            "errors": {_name(key): self.made.relative(key) for key in self.made.modules},
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
        ranks = sorted(adapter.rank for adapter in self.made.modules.values())
        lines = [
            f"Wrote {self.path} and read it back: equal. {len(ranks)} modules of rank {ranks[0]} to {ranks[-1]}, "
            f"{self.dtype}, relative error {self.made.error:.2g} with the rounding to it."
        ]
        lines += [f"  {_name(key)}: {self.made.relative(key):.2g}" for key in self.made.worst()]
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
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "auto",
    model_path: str | None = None,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Composition:
    """Writes the weighted sum of adapter files as one, in kohya's spelling, or as the first if kohya cannot spell it.

    Args:
        adapters: files or folders, each with one weight or one for each part.
        output_path: file, or folder where the spelling is one.
        rank: of each module; without it and `energy` the sum is exact, so that ranks add up.
        energy: share of each module's squared norm to keep; given instead of a rank.
        dtype: fp32, fp16 or bf16; auto keeps that of the adapters, or fp32 where they differ.
        model_path: base whose modules give the names; needed only for networks of another build than the published.
        embeddings: keep or drop text embeddings that are packed into the files.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or a weight names no part.
        AdapterFileError: a file cannot be read, or the adapters are of different kinds of base.
        UnsupportedError: a kind of adapter that cannot be added like this.
    """
    rule = rank_rule(rank, energy)
    with ExitStack() as opened:
        files = [(opened.enter_context(_run_checkpoints.as_file(path)), weights) for path, weights in adapters]
        return _compose(files, output_path, rule, dtype, find_base(model_path), embeddings, overwrite)


def _compose(
    adapters: Sequence[tuple[Path, float | Mapping[str, float]]],
    output_path: Path,
    rule: RankRule | None,
    dtype: str,
    base: GivenBase | None,
    embeddings: str,
    overwrite: bool,
) -> Composition:
    families, states = zip(*(read_alone(path, base) for path, _ in adapters), strict=True)
    format_: Format = registry.find("formats", _spelling(families[0], base, adapters[0][0]))
    check_target(output_path, format_, overwrite)
    names = file_names([path for path, _ in adapters])
    terms = [
        Term(name, state, part_weights(state, weights, name))
        for name, state, (_, weights) in zip(names, states, adapters, strict=True)
    ]
    sources = [_source(path, term) for (path, _), term in zip(adapters, terms, strict=True)]
    record.check_one_base(sources)
    if len({family.architecture.name for family in families}) > 1:
        kinds = [f"{name} is for {family.architecture.name}" for name, family in zip(names, families, strict=True)]
        raise AdapterFileError("The adapters were made for different kinds of base and cannot be added.", kinds)
    dtype = common_dtype([path for path, _ in adapters]) if dtype == "auto" else dtype
    with one_thread():
        made = as_written(add(terms, rule, _kernels(families[0], base)), format_, find_dtype(dtype))
        met = overlaps(terms)
    packed = _joined_embeddings(terms) if embeddings == "keep" else {}
    _write(
        AdapterState(made.modules, record.metadata(sources, made, output_path.stem, time.time()), packed),
        families[0],
        base,
        format_,
        output_path,
        dtype,
    )
    left = share_left(terms, made)
    _warn_of_nothing(left)
    found = keys(terms)
    missing = {term.name: len(found) - len(term.state.modules) for term in terms}
    return Composition(output_path, made, dtype, tuple(met), missing, left)


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
    found: dict[str, Tensor] = {}
    for term in terms:
        for name, tensor in term.state.embeddings.items():
            if not same_bits(as_array(found.setdefault(name, tensor)), as_array(tensor)):
                raise AdapterFileError(
                    f"{term.name} and another adapter hold different text embeddings of the name {name}; give "
                    "--embeddings drop, and load them from files of their own."
                )
    return found


def resize(
    input_path: Path,
    output_path: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "auto",
    model_path: str | None = None,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Composition:
    """Writes an adapter at another rank, in the spelling that it has.

    Args:
        input_path: adapter file or folder.
        output_path: file or folder.
        rank: of each module; no rank grows.
        energy: share of each module's squared norm to keep; given instead of a rank.
        dtype: fp32, fp16 or bf16; auto keeps that of the input.
        model_path: base whose modules give the names; needed only for networks of another build than the published.
        embeddings: keep or drop text embeddings that are packed into the file.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or neither or both of rank and energy are given.
        AdapterFileError: the file cannot be read.
        UnsupportedError: a kind of adapter that has no rank of its own.
    """
    rule = required_rank_rule(rank, energy)
    with _run_checkpoints.as_file(input_path) as path:
        format_: Format = registry.find("formats", detect(path))
        check_target(output_path, format_, overwrite)
        base = find_base(model_path)
        family, state = read_alone(path, base)
        term = Term(path.name, state, dict.fromkeys(state.parts(), 1.0))
        dtype = common_dtype([path]) if dtype == "auto" else dtype
        with one_thread():
            made = as_written(add([term], rule, _kernels(family, base)), format_, find_dtype(dtype))
        told = record.metadata([_source(path, term)], made, output_path.stem, time.time())
        written = AdapterState(made.modules, told, state.embeddings if embeddings == "keep" else {})
        _write(written, family, base, format_, output_path, dtype)
    return Composition(output_path, made, dtype, (), {}, share_left([term], made))


def _spelling(family: Family, base: GivenBase | None, path: Path) -> str:
    try:
        names_of(family, "kohya", base)
    except UnsupportedError:
        return detect(path)
    return "kohya"


def _name(key: ModuleKey) -> str:
    return f"{key.part}/{key.path}"


def _kernels(family: Family, base: GivenBase | None) -> dict[ModuleKey, tuple[int, ...]]:
    """Returns the sizes of the convolutions of a base, or of the one that a family published."""
    if base is not None:
        return base.kernels()
    if family.architecture.name not in DIFFUSION:
        return {}
    return {
        key: shape[2:] for key, shape in published_shapes(DIFFUSION[family.architecture.name]).items() if len(shape) > 2
    }


def _source(path: Path, term: Term) -> Source:
    return Source(term.name, hash_adapter(path), term.weights, term.state.metadata)


def _write(
    state: AdapterState, family: Family, base: GivenBase | None, format_: Format, path: Path, dtype: str
) -> None:
    state = replace(state, metadata=with_base(state.metadata, family.architecture.name))
    key_map = names_of(family, format_.name, base)
    with dtype_named():
        write_verified(state, key_map, format_, path, find_dtype(dtype))
