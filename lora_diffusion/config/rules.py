"""Ranges of single values and relations between values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lora_diffusion.config.per_module import PER_MODULE, read_entry, read_number
from lora_diffusion.config.schema import DEFAULT_STEPS
from lora_diffusion.core.errors import ConfigError

_POSITIVE = (lambda v: v > 0, "must be greater than 0")
_NOT_NEGATIVE = (lambda v: v >= 0, "must be 0 or greater")
_AT_LEAST_ONE = (lambda v: v >= 1, "must be 1 or greater")
_SHARE = (lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
_FILLED = (lambda v: len(v) > 0, "must not be empty")
_SEEDS = (
    lambda v: len(v) > 0 and all(0 <= seed < 2**63 for seed in v),
    "must be one or more numbers, 0 or greater",
)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: v in choices), f"must be one of {', '.join(choices)}"


def _each_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: len(v) > 0 and set(v) <= set(choices)), f"must name one or more of {', '.join(choices)}"


MAX_DRAWING_STEPS = 999
"""Bases know 1000 noise levels, and samplers that look one step ahead need one more than their steps."""

RANGES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model.path": _FILLED,
    "model.quantization": _one_of("none", "8bit", "nf4"),
    "model.dtype": _one_of("auto", "fp32", "bf16", "fp16"),
    "data.path": _FILLED,
    "adapter.rank": _AT_LEAST_ONE,
    "adapter.alpha": _POSITIVE,
    "adapter.conv_rank": _AT_LEAST_ONE,
    "adapter.conv_alpha": _POSITIVE,
    "adapter.lokr_factor": (lambda v: v == -1 or v >= 1, "must be 1 or greater, or -1"),
    "adapter.dropout": _SHARE,
    "adapter.parts": _FILLED,
    "adapter.targets": _FILLED,
    "train.seed": _NOT_NEGATIVE,
    "train.max_steps": _AT_LEAST_ONE,
    "train.epochs": _AT_LEAST_ONE,
    "train.batch_size": _AT_LEAST_ONE,
    "train.gradient_accumulation": _AT_LEAST_ONE,
    "train.learning_rate": _POSITIVE,
    "train.text_encoder_learning_rate": _POSITIVE,
    "train.optimizer": _one_of("adamw", "adamw8bit", "paged_adamw8bit"),
    "train.weight_decay": _NOT_NEGATIVE,
    "train.schedule": _one_of("constant", "linear", "cosine"),
    "train.warmup_steps": _NOT_NEGATIVE,
    "train.max_grad_norm": _NOT_NEGATIVE,
    "train.precision": _one_of("auto", "fp32", "bf16", "fp16"),
    "train.threads": (lambda v: v == "auto" or (v.isdecimal() and int(v) > 0), "must be auto or a number of threads"),
    "train.save_every_steps": _NOT_NEGATIVE,
    "train.keep_checkpoints": _NOT_NEGATIVE,
    "train.save_adapter_every_steps": _NOT_NEGATIVE,
    "train.save_adapter_every_epochs": _NOT_NEGATIVE,
    "train.preview_every_steps": _NOT_NEGATIVE,
    "train.tracker": _one_of("none", "tensorboard"),
    "preview.seeds": _SEEDS,
    "preview.num_steps": (lambda v: 1 <= v <= MAX_DRAWING_STEPS, f"must be from 1 to {MAX_DRAWING_STEPS}"),
    "preview.guidance": _AT_LEAST_ONE,
    "evaluate.weights": (
        lambda v: len(v) > 0 and len(set(v)) == len(v) and all(weight > 0 and math.isfinite(weight) for weight in v),
        "must be one or more different numbers greater than 0",
    ),
    "evaluate.seeds": _SEEDS,
    "evaluate.every_steps": _NOT_NEGATIVE,
    "evaluate.patience": _NOT_NEGATIVE,
    "evaluate.picture_draws": _NOT_NEGATIVE,
    "output.path": _FILLED,
    "output.formats": _each_of("kohya", "diffusers", "peft"),
    "output.dtype": _one_of("fp32", "fp16", "bf16"),
}


def out_of_range(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line for each value out of range."""
    own = {name: getattr(type(section), "ranges", {}) for name, section in sections.items()}
    rules = {**RANGES, **{f"{name}.{key}": rule for name, table in own.items() for key, rule in table.items()}}
    for dotted, (allows, text) in rules.items():
        section, key = dotted.split(".")
        value = getattr(sections[section], key)
        if value is not None and value != "???" and not allows(value):
            yield f"{dotted}={as_written(value)}: {text}"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{dotted}={value}: must be a finite number"


def contradictions(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line for each pair of values that cannot go together."""
    data, adapter, train = sections["data"], sections["adapter"], sections["train"]
    preview, output = sections["preview"], sections["output"]
    if train.max_steps is not None and train.epochs is not None:
        yield f"train.max_steps={train.max_steps} and train.epochs={train.epochs}: give one of the two"
    if train.save_adapter_every_steps and train.save_adapter_every_epochs:
        yield "train.save_adapter_every_steps and save_adapter_every_epochs name files alike; give one of the two"
    if train.max_steps is not None and 0 < train.max_steps <= train.warmup_steps:
        yield f"train.warmup_steps={train.warmup_steps}: must be less than train.max_steps={train.max_steps}"
    if train.max_steps is None and train.epochs is None and train.warmup_steps >= DEFAULT_STEPS:
        yield (
            f"train.warmup_steps={train.warmup_steps}: must be less than the {DEFAULT_STEPS} steps that are made "
            "without train.max_steps"
        )
    if train.text_encoder_learning_rate is not None and not any("text" in part for part in adapter.parts):
        yield (
            f"train.text_encoder_learning_rate={train.text_encoder_learning_rate}: no text encoder is trained; "
            "add text_encoder to adapter.parts or drop this key"
        )
    for text in train.part_learning_rates:
        part, _, rate = text.partition("=")
        if part not in adapter.parts or not 0 < read_number(rate) < math.inf:
            yield f"train.part_learning_rates: {text!r} does not name one of adapter.parts and a rate, as in unet=1e-4"
    yield from _preview_relations(preview, train)
    yield from _per_module_faults(sections)
    yield from _evaluate_relations(sections["evaluate"])
    yield from data.faults()
    if output.thumbnail == "preview" and not train.preview_every_steps:
        yield "output.thumbnail=preview: no previews are drawn; set train.preview_every_steps or name a picture"
    if output.name is not None and ("/" in output.name or "\\" in output.name or output.name.startswith(".")):
        yield f"output.name={output.name}: must be a plain file name without folders"


def _preview_relations(preview: Any, train: Any) -> Iterator[str]:
    if preview.prompts and not train.preview_every_steps:
        yield "preview.prompts: no previews are drawn; set train.preview_every_steps or drop the prompts"
    if preview.seeds != type(preview)().seeds and not train.preview_every_steps:
        yield "preview.seeds: no previews are drawn; set train.preview_every_steps or drop the seeds"
    if preview.negative and preview.guidance == 1:
        yield "preview.negative: does nothing at preview.guidance=1, which turns guidance off; drop one of the two"


def _per_module_faults(sections: Mapping[str, Any]) -> Iterator[str]:
    for dotted in PER_MODULE:
        section, key = dotted.split(".")
        for text in getattr(sections[section], key):
            try:
                read_entry(dotted, text)
            except ConfigError as error:
                yield str(error)


def _evaluate_relations(evaluate: Any) -> Iterator[str]:
    if evaluate.patience and not evaluate.every_steps:
        yield f"evaluate.patience={evaluate.patience}: there are no scores to wait for; set evaluate.every_steps"
    for key in ("after_training", "every_steps"):
        value = getattr(evaluate, key)
        if value and not evaluate.references:
            yield f"evaluate.{key}={value}: needs evaluate.references, pictures to compare with"


def as_written(value: Any) -> str:
    """Returns a value as it stands in a config."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_written, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
