"""Adapters into base checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.algebra.magnitude_limits import check_magnitudes
from lora_diffusion.compose import merge as merging
from lora_diffusion.compose.checkpoint import Checkpoint
from lora_diffusion.compose.linear import Term, part_weights
from lora_diffusion.compose.merge import Merged
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.errors import ConfigError, ModelError, UnsupportedError
from lora_diffusion.core.files import check_writable
from lora_diffusion.core.logs import logger
from lora_diffusion.core.privacy import public_path
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.text import name_some
from lora_diffusion.formats.detect import is_adapter
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.tensorfile.streaming import TensorFile
from lora_diffusion.workflows._adapter_files import file_names, hash_adapter
from lora_diffusion.workflows._base_and_adapters import read_unchecked
from lora_diffusion.workflows.bases import open_base

_UNET = ("model.diffusion_model.", "diffusion_model.", "input_blocks.", "down_blocks.", "unet.down_blocks.")
"""How names of the UNet begin in a base in one file."""


@dataclass(frozen=True)
class MergeResult:
    """What `merge` wrote."""

    merged: Merged
    dtype: str
    adapters: tuple[Mapping[str, Any], ...]
    """File, hash and weights of each."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "output": str(self.merged.path),
            "dtype": self.dtype,
            "modules": self.merged.num_modules,
            "changed_tensors": self.merged.num_changed,
            "kept_tensors": self.merged.num_kept,
            "adapters": list(self.adapters),
        }

    def text(self) -> str:
        """Returns one line for people."""
        return (
            f"Wrote {self.merged.path} and read it back: {self.merged.num_changed} tensors hold the sum, "
            f"{self.merged.num_kept} are those of the base ({self.dtype})."
        )


def merge(
    model: ModelOptions,
    adapters: Sequence[tuple[Path, float | Mapping[str, float]]],
    output_path: Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
) -> MergeResult:
    """Writes a base with adapters added to its weights, in the layout that the base has.

    Args:
        model: the base, of any family.
        adapters: files or folders, each with one weight or one for each part.
        output_path: folder, or file if the base is a single file.
        dtype: fp32, fp16 or bf16, of the weights of the networks that can hold adapters; auto keeps that of each
            tensor, and all else in the base keeps its dtype anyhow.
        overwrite: replace what is there.

    Raises:
        InputError: the base, an adapter or the output cannot be used.
    """
    family, checkpoint = open_base(model)
    _check_output(checkpoint.path, output_path, overwrite)
    names = file_names([path for path, _ in adapters])
    terms = [_term(path, weights, name, family, model) for (path, weights), name in zip(adapters, names, strict=True)]
    _warn_of_copies(checkpoint)
    sources = [
        {"file": term.name, "sha256": hash_adapter(path), "weights": dict(term.weights)}
        for term, (path, _) in zip(terms, adapters, strict=True)
    ]
    metadata = {
        "modelspec.merged_from": ", ".join([Path(model.path).name, *names]),
        "lora_diffusion.merged": json.dumps({"model": public_path(model.path), "adapters": sources}),
    }
    chosen = None if dtype == "auto" else find_dtype(dtype)
    merged = merging.merge(checkpoint, terms, output_path, chosen, metadata)
    return MergeResult(merged, "as stored" if dtype == "auto" else dtype, tuple(sources))


def _term(path: Path, weights: float | Mapping[str, float], name: str, family: Family, model: ModelOptions) -> Term:
    """Returns an adapter with its weights, without the parts that the base lacks and a weight of 0 leaves out.

    Raises:
        AdapterFileError: it cannot be read, or does not fit the base.
        UnsupportedError: it changes parts that the base lacks.
    """
    state = read_unchecked(path, family, model)
    by_part = part_weights(state, weights, name)
    networks = family.meta_modules(model)
    lacking = [part for part in state.parts() if part not in networks]
    if wanted := [part for part in lacking if by_part[part]]:
        kept = ",".join(f"{part}={0 if part in lacking else by_part[part]:g}" for part in state.parts())
        raise UnsupportedError(
            f"{model.path} holds no {' and no '.join(wanted)}, which {name} changes; give --adapter {path}:{kept} to "
            "merge the rest of it, or take a base with all parts."
        )
    modules = {key: adapter for key, adapter in state if key.part not in lacking}
    state = replace(state, modules=modules)
    from lora_diffusion.adapters.state import check_fit

    check_fit(state, networks, str(path))
    check_magnitudes(state, str(path))
    if state.embeddings:
        logger.warning(
            "%s: %d packed text embeddings are no weights of a base and are left out; load them beside it: %s",
            name,
            len(state.embeddings),
            name_some(list(state.embeddings)),
        )
    return Term(name, state, {part: by_part[part] for part in state.parts()})


def _warn_of_copies(checkpoint: Checkpoint) -> None:
    copies = [name for file in checkpoint.files.values() for name in file.tensors if name.startswith("model_ema.")]
    if copies:
        logger.warning(
            "%s: the %d tensors of model_ema are kept as they are, so programs that sample by these averaged copies "
            "see the base without the adapters.",
            checkpoint.path,
            len(copies),
        )


def _check_output(base: Path, output: Path, overwrite: bool) -> None:
    """Checks that writing a base to a path destroys nothing but a base, and not the one that is read."""
    check_writable(output.absolute().parent, "--output")
    base, new = base.resolve(), output.resolve()
    if new == base or base in new.parents:
        raise ConfigError(f"--output {output} lies in the base that is read; give another name.")
    if new.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists; give another name or --overwrite.")
    if new.is_file() and not _is_checkpoint(new):
        raise ConfigError(f"--output {output} is no base, and nothing else is replaced; give another name.")
    is_base = any((new / name).is_file() for name in ("model_index.json", "config.json"))
    if new.is_dir() and any(new.iterdir()) and not is_base:
        raise ConfigError(f"--output {output} is a folder that holds something else; give another name.")
    if base.is_file() and (new.is_dir() or new.suffix != ".safetensors"):
        raise ConfigError(f"--output {output}: a base in one file becomes one; name a file that ends in .safetensors.")
    if base.is_dir() and new.is_file():
        raise ConfigError(f"--output {output} is a file, and the base is a folder; name a folder.")


def _is_checkpoint(path: Path) -> bool:
    """Says whether a file is a whole safetensors file with names of a base."""
    try:
        return any(name.startswith(_UNET) for name in TensorFile(path).tensors) and not is_adapter(path)
    except ModelError:
        return False
