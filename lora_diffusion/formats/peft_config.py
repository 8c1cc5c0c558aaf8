"""The record of ranks and alphas that PEFT keeps beside its tensors, and diffusers in the header."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from lora_diffusion.algebra.delta import kronecker_split
from lora_diffusion.core.adapter_state import ModuleAdapter
from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.files import parse_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.formats.capabilities import BIAS, EMBEDDINGS
from lora_diffusion.formats.tensor_names import PEFT
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array, as_array, upcast

if TYPE_CHECKING:
    import torch


DIFFUSERS_RECORD = "lora_adapter_metadata"
"""Key of diffusers' metadata under which it stands."""
_KERNELS = (1, 9)
"""Sizes of kernels that a flattened factor may hold; the tensors do not tell."""
_SHOWN = 10


class _Sizes(NamedTuple):
    first: tuple[int, int]
    second: tuple[tuple[int, int], ...]
    """One pair for each size of kernel that it may have."""
    is_first_whole: bool
    is_second_whole: bool
    rank: int


def is_whole(adapter: ModuleAdapter) -> bool:
    """Says whether an adapter is lokr with two factors that are not low-rank, so that its alpha means nothing."""
    return {"w1", "w2"} <= adapter.tensors.keys()


def peft_rank(adapter: ModuleAdapter) -> int:
    """Returns the rank that PEFT must be told: for two whole factors, one that makes it leave them whole."""
    if is_whole(adapter):
        return int(max(*adapter.tensors["w1"].shape, *adapter.tensors["w2"].shape[:2]))
    return adapter.rank


def kronecker_settings(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Returns the settings with which PEFT makes layers of these sizes.

    Raises:
        UnsupportedError: there are none.
    """
    sizes = {path: _sizes(adapter) for path, adapter in adapters.items()}
    sides = {side for size in sizes.values() for side in size.first}
    is_both = any(not size.is_first_whole for size in sizes.values())
    for factor in (-1, *sorted(sides)):
        if all(_fits_factor(size, factor, is_both) for size in sizes.values()):
            return {"decompose_factor": factor, "decompose_both": is_both}
    odd = [
        path for path, size in sizes.items() if not any(_fits_factor(size, factor, is_both) for factor in (-1, *sides))
    ]
    raise UnsupportedError(
        "PEFT cannot hold this lokr adapter, since it works out the sizes of the factors from one setting, and no "
        "setting gives these. Keep it in the kohya format.",
        (odd or list(sizes))[:_SHOWN],
    )


def _sizes(adapter: ModuleAdapter) -> _Sizes:
    tensors = adapter.tensors
    first = tuple(tensors["w1"].shape) if "w1" in tensors else (len(tensors["w1_a"]), tensors["w1_b"].shape[1])
    if "w2" in tensors:
        seconds: Sequence[tuple[int, int]] = [(tensors["w2"].shape[0], tensors["w2"].shape[1])]
    elif "t2" in tensors:
        seconds = [(tensors["w2_a"].shape[1], tensors["w2_b"].shape[1])]
    else:
        outputs, inputs = tensors["w2_a"].shape[0], tensors["w2_b"].shape[1]
        seconds = [(outputs, inputs // kernel) for kernel in _KERNELS if inputs % kernel == 0]
    return _Sizes((first[0], first[1]), tuple(seconds), "w1" in tensors, "w2" in tensors, peft_rank(adapter))


def _fits_factor(sizes: _Sizes, factor: int, is_both: bool) -> bool:
    """Says whether PEFT makes a module of these sizes; see LoKrLayer.update_layer in peft 0.21."""
    first_whole = not (is_both and sizes.rank < max(sizes.first) / 2)
    return first_whole == sizes.is_first_whole and any(
        kronecker_split(sizes.first[0] * second[0], factor) == (sizes.first[0], second[0])
        and kronecker_split(sizes.first[1] * second[1], factor) == (sizes.first[1], second[1])
        and (sizes.rank >= max(second) / 2) == sizes.is_second_whole
        for second in sizes.second
    )


_MOVED = "text_model."
"""transformers 5.6 took this level out of CLIPTextModel, so a module is found with it and without."""
_OTHER_SETTINGS = (
    *("lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
    *("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config"),
)
"""Settings of PEFT with which its factors are not all of the change, or change something else."""
_CONVERT_START = (
    "Where it was trained, save it as a plain LoRA: save_pretrained(FOLDER, "
    "path_initial_model_for_weight_conversion=FOLDER_OF_THE_UNTRAINED_ADAPTER)"
)
_MUTATING_STARTS: Mapping[str, str] = {
    **dict.fromkeys(("pissa", "olora", "corda", "lora_ga"), _CONVERT_START),
    "loftq": "Merge it into its base where it was trained: model.merge_and_unload()",
}
"""Beginning of init_lora_weights with which PEFT changes the base's weights too -> what to do with the adapter."""


class _PeftType(NamedTuple):
    name: str
    alpha: str = "alpha"
    """What PEFT calls alpha in the configuration of this type."""


_PEFT_TYPES: Mapping[str, _PeftType] = {
    "lora": _PeftType("LORA", "lora_alpha"),
    "dora_out": _PeftType("LORA", "lora_alpha"),
    "loha": _PeftType("LOHA"),
    "lokr": _PeftType("LOKR"),
}


def _settings(variant: str, adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Returns what PEFT must be told to make tensors of these sizes."""
    if variant == "dora_out":
        return {"use_dora": True}
    # PEFT makes a core tensor for all wide convolutions or for none.
    has_cores = any({"t1", "t2"} & adapter.tensors.keys() for adapter in adapters.values())
    if variant == "loha":
        return {"use_effective_conv2d": has_cores}
    return {"use_effective_conv2d": has_cores, **kronecker_settings(adapters)} if variant == "lokr" else {}


def write_config(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Returns the arguments of PEFT's configuration for these modules, by path; every expression names whole paths.

    Args:
        adapters: all of one variant.

    Raises:
        UnsupportedError: lokr in sizes that PEFT would not make.
    """
    adapters = dict(sorted(adapters.items()))  # equal adapters give equal records
    variant = next(iter(adapters.values())).variant
    ranks = {path: peft_rank(adapter) for path, adapter in adapters.items()}
    # PEFT divides by the rank where the formula of lokr does not.
    alphas = {path: float(ranks[path]) if is_whole(adapter) else adapter.alpha for path, adapter in adapters.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        _PEFT_TYPES[variant].alpha: alpha,
        "target_modules": _either(adapters),
        "rank_pattern": _pattern({path: value for path, value in ranks.items() if value != rank}),
        "alpha_pattern": _pattern({path: value for path, value in alphas.items() if value != alpha}),
        **_settings(variant, adapters),
    }


def peft_type(adapters: Mapping[str, ModuleAdapter]) -> str:
    """Returns PEFT's name of the type of these adapters."""
    return _PEFT_TYPES[next(iter(adapters.values())).variant].name


def recorded_alpha(config: Mapping[str, Any], path: str) -> float:
    """Returns the alpha of a module, whose scale is alpha / rank.

    PEFT takes the first pattern that fits the end of the path, or the general value; with use_rslora its scale is
    alpha / sqrt(rank).
    """
    alpha = float(_matched(config, "alpha_pattern", path, _alpha(config)))
    return alpha * math.sqrt(recorded_rank(config, path)) if config.get("use_rslora") else alpha


def recorded_rank(config: Mapping[str, Any], path: str) -> int:
    """Returns the rank of the layer that PEFT makes for a module."""
    return int(_matched(config, "rank_pattern", path, config.get("r", 1)))


def warn_of_ranks(adapters: Mapping[str, ModuleAdapter], config: Mapping[str, Any], source: Path) -> None:
    """Warns of lora modules, by path, of another rank than the record says; PEFT could not load them."""
    other = [
        path
        for path, adapter in adapters.items()
        if "down" in adapter.tensors and adapter.rank != recorded_rank(config, path)
    ]
    if other:
        logger.warning(
            "%s: %d modules are of another rank than the record beside them says, so that PEFT and diffusers refuse "
            "them; alpha is divided by the rank that they have: %s",
            source,
            len(other),
            name_some(other),
        )


def without_recorded_scale(adapter: ModuleAdapter, config: Mapping[str, Any], path: str) -> ModuleAdapter:
    """Returns an adapter whose scale is what PEFT makes of the record: lokr with two whole factors has none."""
    if not is_whole(adapter):
        return adapter
    scale = recorded_alpha(config, path) / recorded_rank(config, path)
    first: Any = adapter.tensors["w1"] if scale == 1 else upcast(as_array(adapter.tensors["w1"])) * numpy.float32(scale)
    return replace(adapter, tensors={**adapter.tensors, "w1": first}, alpha=float(adapter.rank))


def check_config(config: Any, source: Path) -> None:
    """Checks that the record describes an adapter that can be read.

    Raises:
        AdapterFileError: it is not such a record.
        UnsupportedError: it asks for more than that.
    """
    if not isinstance(config, dict) or not isinstance(config.get("peft_type", "LORA"), str):
        raise AdapterFileError(f"{source} cannot be read as a LoRA configuration: it is no table, or tells no kind.")
    _check_type(config, source)
    if not _is_number(_alpha(config)):
        raise AdapterFileError(f"{source} cannot be read as a LoRA configuration: an alpha is missing or no number.")
    if not _is_number(config.get("r", 1)) or config.get("r", 1) < 1:
        raise AdapterFileError(
            f"{source} cannot be read as a LoRA configuration: r={shown(repr(config['r']))} is no rank."
        )
    for field in ("alpha_pattern", "rank_pattern"):
        _check_patterns(config.get(field) or {}, field, source)


def read_diffusers_record(metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Any]]:
    """Returns part -> the record of its ranks and alphas; empty if the file has none.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it describes another kind of adapter.
    """
    try:
        flat = parse_json(metadata.get(DIFFUSERS_RECORD, "{}"))
        configs: dict[str, dict[str, Any]] = {}
        for dotted, value in flat.items():
            part, field = dotted.split(".", 1)
            configs.setdefault(part, {})[field] = value
    except (ValueError, AttributeError) as error:
        raise AdapterFileError(f"{path}: its {DIFFUSERS_RECORD} cannot be read ({error}).") from error
    for config in configs.values():
        check_config(config, path)
    return configs


def _check_type(config: Mapping[str, Any], source: Path) -> None:
    """Refuses types of adapter, and settings of a known type, that the tensors alone do not tell."""
    peft_type = config.get("peft_type", "LORA")
    known = dict.fromkeys(peft_type.name for peft_type in _PEFT_TYPES.values())
    if peft_type not in known:
        raise UnsupportedError(
            f"{source} describes an adapter of the kind {shown(peft_type.lower())}; {', '.join(known).lower()} can be "
            "read."
        )
    unreadable = [name for name in _OTHER_SETTINGS if config.get(name)]
    if config.get("bias", "none") != "none":
        unreadable.append("bias")
    if unreadable:
        raise UnsupportedError(
            f"{source} is {peft_type.lower()} with {', '.join(unreadable)}; {', '.join(known)} without it can be read."
        )
    start = str(config.get("init_lora_weights")).lower()
    remedy = next((remedy for name, remedy in _MUTATING_STARTS.items() if start.startswith(name)), None)
    if remedy:
        raise UnsupportedError(
            f"{source} has init_lora_weights={shown(start)}: the factors begin with a piece of the base that was taken "
            f"out of its weights, so that they are no change of that base. {remedy}."
        )


def _check_patterns(patterns: Any, field: str, source: Path) -> None:
    """Refuses expressions that cannot be read or may take for ever; PEFT itself writes names and few wildcards."""
    least = 1 if field == "rank_pattern" else -math.inf
    if not isinstance(patterns, dict) or not all(_is_number(value) and value >= least for value in patterns.values()):
        raise AdapterFileError(f"{source} cannot be read as a LoRA configuration: {field} must name numbers.")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterFileError(
                f"{source}: {field} holds {shown(pattern)}, which is no regular expression ({error})."
            ) from error
        if _REPEATED_GROUP.search(pattern) or len(_REPEATS.findall(pattern)) > _MOST_REPEATS:
            raise AdapterFileError(
                f"{source}: {field} holds {shown(pattern)}, whose search could take for ever; write whole paths."
            )


_REPEATED_GROUP = re.compile(r"(?<!\\)\)[*+{]")
_REPEATS = re.compile(r"(?<![\\(])[*+{?]")
_MOST_REPEATS = 2
"""The time of a search grows with the length of a path to the power of their number."""


def _is_number(value: Any) -> bool:
    """Says whether a value is a number that a float can hold, which many digits of JSON are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _alpha(config: Mapping[str, Any]) -> Any:
    return config.get("lora_alpha", config.get("alpha"))


def _matched(config: Mapping[str, Any], patterns: str, path: str, default: Any) -> Any:
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    return {
        f"^{_either(path for path, number in values.items() if number == value)}": value
        for value in dict.fromkeys(values.values())
    }


def _either(paths: Iterable[str]) -> str:
    return rf"(?:{re.escape(_MOVED)})?(?:{'|'.join(re.escape(path.removeprefix(_MOVED)) for path in paths)})"


WRONG_AXIS = (
    "PEFT has a magnitude for each output, and this adapter one for each input. Train with adapter.variant=dora_out, "
    "or merge it into the base"
)


_OTHER = "PEFT has other layers for it, or none"
NOT_IN_PEFT = {
    **dict.fromkeys(("loha+dora", "loha+dora_out", "lokr+dora", "lokr+dora_out"), _OTHER),
    **dict.fromkeys(("full", "norm", "set", "ia3", "oft", "boft", "glora"), _OTHER),
    BIAS: "neither PEFT nor diffusers reads a change of a bias as a difference",
    EMBEDDINGS: "PEFT and diffusers keep them in files of their own; leave them out with --embeddings drop",
}
"""What the formats of PEFT and diffusers cannot hold -> the reason."""


def check_one_variant(part: str, adapters: Iterable[ModuleAdapter]) -> None:
    """Checks that adapters are of one variant, which PEFT records once for all of them.

    Raises:
        UnsupportedError: there are several.
    """
    variants = sorted({adapter.variant for adapter in adapters})
    if len(variants) > 1:
        raise UnsupportedError(
            f"PEFT and diffusers hold one kind of adapter in each part, but {part} has {' and '.join(variants)}. "
            "Keep the kohya format."
        )


def peft_tensors(name: str, adapter: ModuleAdapter, dtype: torch.dtype | None) -> dict[str, Array]:
    """Returns the tensors of a module, magnitudes as [out] or [1, out, 1, 1], by their names in a file.

    Raises:
        NonFiniteError: a value does not fit `dtype`.
        UnsupportedError: a lora with a Tucker core.
    """
    if "mid" in adapter.tensors:
        raise UnsupportedError(
            f"{name} is a lora with a Tucker core, which PEFT and diffusers do not have; keep the kohya format."
        )
    tensors = dict(adapter.tensors)
    if "magnitude" in tensors:
        # PEFT: [out], and [1, out, 1, 1] on a convolution.
        flat = tensors["magnitude"].reshape(-1)
        tensors["magnitude"] = flat if tensors["down"].ndim == 2 else flat.reshape(1, -1, 1, 1)
    suffixes = PEFT["lora" if adapter.variant == "dora_out" else adapter.variant]
    return {
        f"{name}{suffix}": safetensors_file.cast(name, tensors[tensor], dtype)
        for tensor, suffix in suffixes.items()
        if tensor in tensors
    }
