"""Adapters into base checkpoints, and out of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.adapters.plan import plan
from lora_diffusion.algebra.lowrank import required_rank_rule
from lora_diffusion.algebra.magnitude_limits import check_sizes
from lora_diffusion.compose import extract as extracting
from lora_diffusion.compose import merge as merging
from lora_diffusion.compose.checkpoint import Checkpoint, open_checkpoint
from lora_diffusion.compose.extract import Extraction
from lora_diffusion.compose.linear import Term, as_written, part_weights
from lora_diffusion.compose.merge import Merged
from lora_diffusion.config.schema import AdapterConfig, ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError, MissingModelError, ModelError, UnsupportedError, UntrainableError
from lora_diffusion.core.files import check_writable
from lora_diffusion.core.logs import logger
from lora_diffusion.core.privacy import public_path
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.core.text import name_some
from lora_diffusion.formats import metadata
from lora_diffusion.formats.detect import is_adapter
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.tensorfile.streaming import TensorFile
from lora_diffusion.workflows._files import check_target, dtype_named, file_names, hash_adapter
from lora_diffusion.workflows._steps import read_unchecked

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
            tensor, and all else in the base keeps its own anyhow.
        overwrite: replace what is there.

    Raises:
        InputError: the base, an adapter or the output cannot be used.
    """
    family, checkpoint = _open(model)
    _check_output(checkpoint.path, output_path, overwrite)
    names = file_names([path for path, _ in adapters])
    terms = [_term(path, asked, name, family, model) for (path, asked), name in zip(adapters, names, strict=True)]
    _warn_of_copies(checkpoint)
    made_from = [
        {"file": term.name, "sha256": hash_adapter(path), "weights": dict(term.weights)}
        for term, (path, _) in zip(terms, adapters, strict=True)
    ]
    told = {
        "modelspec.merged_from": ", ".join([Path(model.path).name, *names]),
        "lora_diffusion.merged": json.dumps({"model": public_path(model.path), "adapters": made_from}),
    }
    chosen = None if dtype == "auto" else find_dtype(dtype)
    merged = merging.merge(checkpoint, terms, output_path, chosen, told)
    return MergeResult(merged, "as stored" if dtype == "auto" else dtype, tuple(made_from))


def _term(path: Path, asked: float | Mapping[str, float], name: str, family: Family, model: ModelOptions) -> Term:
    """Returns an adapter with its weights, without the parts that the base lacks and a weight of 0 leaves out.

    Raises:
        AdapterFileError: it cannot be read, or does not fit the base.
        UnsupportedError: it changes parts that the base lacks.
    """
    state = read_unchecked(path, family, model)
    weights = part_weights(state, asked, name)
    skeleton = family.meta_modules(model)
    lacking = [part for part in state.parts() if part not in skeleton]
    if wanted := [part for part in lacking if weights[part]]:
        kept = ",".join(f"{part}={0 if part in lacking else weights[part]:g}" for part in state.parts())
        raise UnsupportedError(
            f"{model.path} holds no {' and no '.join(wanted)}, which {name} changes; give --adapter {path}:{kept} to "
            "merge the rest of it, or take a base with all parts."
        )
    modules = {key: own for key, own in state if key.part not in lacking}
    state = replace(state, modules=modules)
    from lora_diffusion.adapters.state import check_fit

    check_fit(state, skeleton, str(path))
    check_sizes(state, str(path))
    if state.embeddings:
        logger.warning(
            "%s: %d packed text embeddings are no weights of a base and are left out; load them beside it: %s",
            name,
            len(state.embeddings),
            name_some(list(state.embeddings)),
        )
    return Term(name, state, {part: weights[part] for part in state.parts()})


def _warn_of_copies(checkpoint: Checkpoint) -> None:
    copies = [name for file in checkpoint.files.values() for name in file.tensors if name.startswith("model_ema.")]
    if copies:
        logger.warning(
            "%s: the %d tensors of model_ema are kept as they are, so programs that sample by these averaged copies "
            "see the base without the adapters.",
            checkpoint.path,
            len(copies),
        )


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
        format_name: spelling of the file.
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
    family, before = _open(base, "vae")
    _, after = _open(tuned, "vae")
    skeleton = family.meta_modules(base)
    parts = tuple(parts or (part for part in family.parts if part in skeleton))
    groups = dict.fromkeys(group for name in parts if name in family.parts for group in family.parts[name].groups)
    asked = AdapterConfig(rank=1, parts=parts, targets=tuple(targets or groups))
    modules = [module.key for module in plan(skeleton, family.parts, asked).modules]
    extraction = extracting.extract(before, after, modules, rule, seed=0)
    extraction = replace(extraction, changes=as_written(extraction.changes, format_, find_dtype(dtype)))
    _warn_of_others(extraction, base, tuned)
    _warn_of_rounding(extraction, base, tuned)
    state = AdapterState(extraction.changes.modules)
    told = _told(state, family, base, output_path.stem)
    made_from = {
        "base": public_path(base.path),
        "tuned": public_path(tuned.path),
        "relative_error": extraction.changes.error,
    }
    state = replace(state, metadata={**told, "lora_diffusion.extracted": json.dumps(made_from)})
    with dtype_named():
        write_verified(state, family.key_map(format_name, base), format_, output_path, find_dtype(dtype))
    return ExtractResult(output_path, extraction, dtype)


def _told(state: AdapterState, family: Family, base: ModelOptions, name: str) -> dict[str, str]:
    """Returns the metadata of an extracted adapter; less is known of a base that is not whole."""
    try:
        info: BaseInfo = family.check(base)
    except UntrainableError:
        return metadata.with_base(
            {"modelspec.title": name, "ss_sd_model_name": Path(base.path).name}, family.architecture.name
        )
    return metadata.build(
        state,
        architecture=info.architecture,
        name=name,
        written_at=time.time(),
        resolution=(info.resolution, info.resolution),
        prediction_type=info.prediction,
        training={"sd_model_name": Path(base.path).name},
    )


def _warn_of_others(extraction: Extraction, base: ModelOptions, tuned: ModelOptions) -> None:
    if extraction.others is None:
        logger.warning(
            "%s and %s are laid out differently, so only the weights of the asked modules were compared, not norms, "
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


def find_model(path: str, family: str | None = None) -> ModelOptions:
    """Returns the options of a base of the named family, or of the first that takes it.

    Raises:
        ModelError: no family takes it; says why for each.
    """
    return _find(path, family, lambda found, options: found.check(options))


def find_weights(path: str, family: str | None = None) -> ModelOptions:
    """Returns the options of a base as `find_model`, also of one that can be neither trained nor run.

    Such are bases for inpainting, UNets alone, and files without VAE or text encoders.

    Raises:
        ModelError: no family takes it; says why for each.
    """
    return _find(path, family, _place)


def _place(family: Family, options: ModelOptions) -> Path:
    """Returns where the weights of a base lie on this machine.

    Raises:
        ModelError: they are not of this family.
    """
    try:
        return family.check(options).path
    except UntrainableError as error:
        return error.path


def _find(path: str, family: str | None, check: Callable[[Family, ModelOptions], Any]) -> ModelOptions:
    faults: dict[str, list[str]] = {}
    for name in [family] if family else registry.available("families"):
        found: Family = registry.find("families", name)
        options: ModelOptions = found.options_type(family=name, path=path)
        try:
            check(found, options)
        except MissingModelError as error:
            faults.setdefault(str(error) if family else error.message, []).append(name)
        except UntrainableError as error:
            raise ModelError(str(error)) from error
        except ModelError as error:
            faults.setdefault(str(error), []).append(name)
        else:
            return options
    if len(faults) == 1:
        raise ModelError(next(iter(faults)))
    raise ModelError(
        f"{path} is no base of a known family.", [f"{', '.join(names)}: {fault}" for fault, names in faults.items()]
    )


def _open(model: ModelOptions, *more: str) -> tuple[Family, Checkpoint]:
    """Opens the networks of a base that can hold adapters, and more of its folders."""
    family: Family = registry.find("families", model.family)
    path = _place(family, model)
    names = family.key_map("ldm" if path.is_file() else "peft", model)
    return family, open_checkpoint(path, [*family.parts, *more], names)


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
