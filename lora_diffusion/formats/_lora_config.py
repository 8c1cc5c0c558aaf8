"""The record of ranks and alphas that PEFT keeps beside its tensors, and diffusers in the header."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import AdapterFileError, UnsupportedError
from lora_diffusion.core.types import ModuleAdapter

_MOVED = "text_model."
"""transformers 5.6 took this level out of CLIPTextModel, so a module is found with it and without."""
_OTHER_KINDS = ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "target_parameters")


def write_config(adapters: Mapping[str, ModuleAdapter]) -> dict[str, Any]:
    """Returns the arguments of `peft.LoraConfig` for these modules, by path; every expression names whole paths."""
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    ranks = {path: adapter.rank for path, adapter in adapters.items() if adapter.rank != rank}
    alphas = {path: adapter.alpha for path, adapter in adapters.items() if adapter.alpha != alpha}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _either(adapters),
        "rank_pattern": _pattern(ranks),
        "alpha_pattern": _pattern(alphas),
    }


def find_alpha(config: Mapping[str, Any], path: str) -> float:
    """Returns the alpha that PEFT gives a module: of the first pattern that fits the end of its path, or lora_alpha."""
    for pattern, alpha in config.get("alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(config["lora_alpha"])


def check_config(config: Any, source: Path) -> None:
    """Checks that the record describes plain LoRA.

    Raises:
        AdapterFileError: it is not such a record.
        UnsupportedError: it asks for more than that.
    """
    alphas = (
        [config.get("lora_alpha"), *config.get("alpha_pattern", {}).values()] if isinstance(config, dict) else [None]
    )
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        raise AdapterFileError(f"{source} cannot be read as a LoRA configuration: an alpha is missing or no number.")
    kind = config.get("peft_type", "LORA")
    asked = [name for name in _OTHER_KINDS if config.get(name)]
    if kind != "LORA" or asked or config.get("bias", "none") != "none":
        what = f"a {kind} adapter" if kind != "LORA" else f"lora with {', '.join(asked) or 'bias'}"
        raise UnsupportedError(f"{source} is {what}; only plain lora can be read.")


def _pattern(values: Mapping[str, float]) -> dict[str, float]:
    return {
        f"^{_either(path for path, own in values.items() if own == value)}": value
        for value in dict.fromkeys(values.values())
    }


def _either(paths: Iterable[str]) -> str:
    return rf"(?:{re.escape(_MOVED)})?(?:{'|'.join(re.escape(path.removeprefix(_MOVED)) for path in paths)})"
