"""An adapter file at another rank; no base model is needed."""

from __future__ import annotations

import time
from pathlib import Path

from lora_diffusion.algebra.lowrank import required_rank_rule
from lora_diffusion.compose import record
from lora_diffusion.compose.linear import Term, add, as_written, share_left
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.detect import detect
from lora_diffusion.runtime.autotune import one_thread
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import check_target, common_dtype, find_base, open_adapter, read_alone
from lora_diffusion.workflows.compose import Composition, kernels, source_of, write_sum


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
    """Writes an adapter at another rank, in the format that it has.

    Args:
        input_path: adapter file or folder.
        output_path: file or folder.
        rank: of each module; no rank grows.
        energy: share of each module's squared norm to keep; given instead of a rank.
        dtype: fp32, fp16 or bf16; auto keeps that of the input.
        model_path: base whose modules give the names; needed only for networks of another size than the published ones.
        embeddings: keep or drop text embeddings that are packed into the file.
        overwrite: replace what is there.

    Raises:
        ConfigError: the output exists, or neither or both of rank and energy are given.
        AdapterFileError: the file cannot be read.
        UnsupportedError: a variant that has no rank.
    """
    rule = required_rank_rule(rank, energy)
    with _run_checkpoints.as_file(input_path) as path:
        file = open_adapter(path)
        format_: Format = registry.find("formats", detect(file))
        check_target(output_path, format_, overwrite)
        base = find_base(model_path)
        family, state = read_alone(file, base)
        term = Term(path.name, state, dict.fromkeys(state.parts(), 1.0))
        dtype = common_dtype([file]) if dtype == "auto" else dtype
        with one_thread():
            total = as_written(add([term], rule, kernels(family, base)), format_, find_dtype(dtype))
        metadata = record.metadata([source_of(file, term)], total, output_path.stem, time.time())
        written = AdapterState(total.modules, metadata, state.embeddings if embeddings == "keep" else {})
        write_sum(written, family, base, format_, output_path, dtype)
    return Composition(output_path, total, dtype, (), {}, share_left([term], total))
