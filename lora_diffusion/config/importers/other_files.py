"""Files of other programs that are given as a config: what they are, and what their settings are called here."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lora_diffusion.config.importers.other_trainers import KEYS
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import parse_json
from lora_diffusion.core.text import shown


@dataclass(frozen=True)
class _OtherFile:
    """A sort of file that is no config of ours."""

    title: str
    is_such: Callable[[Mapping[str, Any]], bool]
    """Looks at the keys of the file, and of its sections."""
    advice: str = ""
    """What to do; without any, how to start a config of one's own."""


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: all(key in values for key in keys)


def _has_two(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: sum(key in values for key in keys) >= 2


def _holds(key: str, type_: type[Any], inside: str = "") -> Callable[[Mapping[str, Any]], bool]:
    return lambda values: isinstance(values.get(key), type_) and (not inside or inside in values[key])


_SECTIONS = ("model", "data", "adapter", "train", "preview", "evaluate", "cache", "output")
_OTHER_FILES = (
    _OtherFile("a preset of the kohya_ss GUI", _has("LoRA_type")),
    _OtherFile("a config of LoRA_Easy_Training_Scripts", _has("network_args", "general_args")),
    _OtherFile("a config of ai-toolkit", _holds("config", dict, "process")),
    _OtherFile(
        "a config of OneTrainer",
        _has_two("training_method", "base_model_name", "__version", "concept_file_name", "output_model_destination"),
    ),
    _OtherFile(
        "a config of accelerate",
        _has_two("compute_environment", "distributed_type", "num_processes", "main_training_function"),
        "start training with it: accelerate launch --config_file FILE -m lora_diffusion train --config CONFIG",
    ),
    _OtherFile("a config of DeepSpeed", _has("zero_optimization"), "training takes it from 'accelerate config' only"),
    _OtherFile(
        "the adapter_config.json of a PEFT folder",
        _has("peft_type", "target_modules"),
        "give the folder to a command that reads adapters, say lora-diffusion inspect FOLDER",
    ),
    _OtherFile("the config.json of a model", _has("architectures"), "give its folder as model.path"),
    _OtherFile("the config of a diffusers model", _has("_class_name"), "give the folder of the pipeline as model.path"),
    _OtherFile(
        "a workflow of ComfyUI", _has("nodes", "links"), "it generates images, and holds nothing that could be trained"
    ),
    _OtherFile(
        "a training config of kohya's sd-scripts",
        _has_two(
            *("network_module", "network_dim", "network_alpha", "network_train_unet_only", "train_data_dir"),
            *(
                "dataset_config",
                "unet_lr",
                "text_encoder_lr",
                "max_train_steps",
                "max_train_epochs",
                "train_batch_size",
            ),
            *(
                "lr_scheduler",
                "lr_warmup_steps",
                "save_every_n_epochs",
                "optimizer_type",
                "pretrained_model_name_or_path",
            ),
        ),
    ),
    _OtherFile("a config of SimpleTuner", _has_two("data_backend_config", "lora_rank", "model_family", "model_type")),
    _OtherFile("the data set config of kohya's sd-scripts or musubi-tuner", _holds("datasets", list)),
    _OtherFile(
        "a config of a trainer of language models",
        _has_two("base_model", "model_name_or_path", "datasets", "finetuning_type", "micro_batch_size", "lora_target"),
    ),
    _OtherFile(
        "a suite of prompts",
        lambda values: all(isinstance(value, list) for value in values.values()) and not set(values) & set(_SECTIONS),
        "give it to 'lora-diffusion evaluate --prompts', or name it in evaluate.prompts",
    ),
)
"""The first that fits counts."""
_START = "copy one that comes along, say 'lora-diffusion config copy sd1/style', and set in it what matters"
_MOST_SHOWN = 20
_DEPTH = 5


def refuse_others(path: Path, text: str, values: Any) -> None:
    """Does nothing for what may be a config of ours.

    Args:
        path: the file.
        text: what it holds.
        values: that as YAML; None where it is none.

    Raises:
        ConfigError: the file is another program's; says which, and what its settings are called here.
    """
    is_toml, values = _as_other(path, text, values)
    if not isinstance(values, dict):
        if is_toml:
            _refuse(path, "a TOML file", "", {})
        return
    if not is_toml and any(isinstance(values.get(section), dict) for section in _SECTIONS):
        return
    levels = [*_levels(values, _DEPTH)]
    near = {key: value for level in reversed(levels[: 1 + len(values)]) for key, value in level.items()}
    other = next((other for other in _OTHER_FILES if near and other.is_such(near)), None)
    if other or is_toml:
        titles = [*(["a TOML file"] if is_toml else []), *([other.title] if other else [])]
        flat = {key: value for level in reversed(levels) for key, value in level.items()}
        _refuse(path, ", ".join(titles), other.advice if other else "", flat)


def _as_other(path: Path, text: str, values: Any) -> tuple[bool, Any]:
    """Says whether a file is TOML, and returns what it holds, read as what it is."""
    ending = path.suffix.lower()
    if ending == ".toml" or not isinstance(values, dict):
        try:
            return True, tomllib.loads(text)
        except (ValueError, RecursionError):
            if ending == ".toml":
                return True, values
    if not isinstance(values, dict) and text.lstrip().startswith("{"):
        try:
            return False, parse_json(text)
        except (ValueError, RecursionError):
            return False, values
    return False, values


def _levels(value: Any, depth: int) -> Iterator[dict[str, Any]]:
    """Yields mappings, the upper ones first among those that lie in one another."""
    if isinstance(value, dict):
        yield {str(key): item for key, item in value.items()}
        value = list(value.values())
    if isinstance(value, list) and depth:
        for item in value[:_MOST_SHOWN]:
            yield from _levels(item, depth - 1)


def _refuse(path: Path, what: str, advice: str, flat: Mapping[str, Any]) -> NoReturn:
    lines = []
    for key, value in flat.items():
        meant = KEYS.get(key.lower().lstrip("-"), "")
        if not advice and re.match(r"\w+\.\w+", meant) and not isinstance(value, dict | list):
            lines.append(f"{shown(key)}={shown(str(value), 40)} is {meant} here")
    if not advice and "network_dim" in flat and "network_alpha" not in flat:
        lines.insert(0, "network_alpha is not given, which means 1 there: adapter.alpha=1 here")
    more = [f"and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    raise ConfigError(
        f"{path} is {what}, not a config, which is YAML with sections such as 'model:'; {advice or _START}.",
        [*lines[:_MOST_SHOWN], *more],
    )
