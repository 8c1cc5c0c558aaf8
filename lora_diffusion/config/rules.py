"""Ranges of single values and relations between values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_diffusion.config.importers.other_trainers import value_hint
from lora_diffusion.config.per_module import PER_MODULE, read_entry, read_number
from lora_diffusion.config.schema import DEFAULT_STEPS, REQUIRED, Contradiction, SplitDataConfig
from lora_diffusion.config.settings import MAX_DENOISING_STEPS, Choice, Rule, allowed_values
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import is_text
from lora_diffusion.core.text import shown

_LARGEST, _LONGEST = 2**63 - 1, 20_000


def out_of_range(sections: Mapping[str, Any]) -> Iterator[str]:
    """Yields one line for each value out of range."""
    for name, section in sections.items():
        for key, value in vars(section).items():
            dotted = f"{name}.{key}"
            rule = allowed_values(type(section), key)
            if rule and value not in (None, REQUIRED) and not rule.test(value):
                yield f"{dotted}={shown(as_written(value))}: {rule.text}{_hint(dotted, value, rule)}"
            else:
                yield from (f"{dotted}={text}" for one in _items(value) if (text := _too_large(one)))


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, tuple) else (value,)


def _too_large(value: Any) -> str | None:
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{shown(value, 20)!r}: must have at most {_LONGEST} characters"
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"{shown(str(value), 20)}: must be less than 2**63"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}: must be a finite number"
    return None


def _hint(dotted: str, value: Any, rule: Rule) -> str:
    """Returns what to write instead of a value that others use, or that looks like one of the choices."""
    if not isinstance(rule, Choice):
        return ""
    wrong = next((one for one in _items(value) if one not in rule.choices), None)
    return value_hint(dotted, wrong, rule.choices) if isinstance(wrong, str) else ""


def contradictions(sections: Mapping[str, Any]) -> Iterator[Contradiction]:
    """Yields what cannot go together, once for each value that could give way."""
    yield from _length_relations(sections["train"])
    yield from _part_relations(sections["adapter"], sections["train"])
    yield from _preview_relations(sections["preview"], sections["train"])
    yield from _per_module_relations(sections)
    yield from _evaluate_relations(sections["evaluate"], sections["data"])
    yield from sections["model"].contradictions()
    yield from sections["data"].contradictions()
    yield from _output_relations(sections["output"], sections["train"])


def _length_relations(train: Any) -> Iterator[Contradiction]:
    if train.max_steps is not None and train.epochs is not None:
        text = f"train.max_steps={train.max_steps} and train.epochs={train.epochs}: give one of the two"
        yield Contradiction(text, "train.max_steps", ("train.epochs",))
        yield Contradiction(text, "train.epochs", ("train.max_steps",))
    elif train.max_steps is not None and 0 < train.max_steps <= train.warmup_steps:
        text = f"train.warmup_steps={train.warmup_steps}: must be less than train.max_steps={train.max_steps}"
        yield Contradiction(text, "train.warmup_steps", ("train.max_steps",))
    if train.save_adapter_every_steps and train.save_adapter_every_epochs:
        text = "train.save_adapter_every_steps and save_adapter_every_epochs name files alike; give one of the two"
        yield Contradiction(text, "train.save_adapter_every_steps", ("train.save_adapter_every_epochs",))
        yield Contradiction(text, "train.save_adapter_every_epochs", ("train.save_adapter_every_steps",))
    if train.max_steps is None and train.epochs is None and train.warmup_steps >= DEFAULT_STEPS:
        text = (
            f"train.warmup_steps={train.warmup_steps}: must be less than the {DEFAULT_STEPS} steps that are made "
            "without train.max_steps"
        )
        yield Contradiction(text, "train.warmup_steps", ("train.max_steps", "train.epochs"))


def _part_relations(adapter: Any, train: Any) -> Iterator[Contradiction]:
    rate = train.text_encoder_learning_rate
    if rate is not None and not any("text" in part for part in adapter.parts):
        text = (
            f"train.text_encoder_learning_rate={rate}: no text encoder is trained; add text_encoder to adapter.parts "
            "or drop this key"
        )
        yield Contradiction(text, "train.text_encoder_learning_rate", ("adapter.parts",))
    key = "train.part_learning_rates"
    rates = {text: text.partition("=") for text in train.part_learning_rates}
    fitting = tuple(text for text, (part, _, _) in rates.items() if part in adapter.parts)
    for text, (part, _, number) in rates.items():
        message = f"{key}: {text!r} does not name one of adapter.parts and a rate, as in unet=1e-4"
        if not 0 < read_number(number) < math.inf:
            yield Contradiction(message)
        elif part not in adapter.parts:
            yield Contradiction(message, key, ("adapter.parts",), fitting)
    idle = [part for part in adapter.full if part not in adapter.parts]
    if idle:
        text = f"adapter.full asks for {', '.join(idle)}, which is not trained; add it to adapter.parts"
        trained = tuple(part for part in adapter.full if part in adapter.parts)
        yield Contradiction(text, "adapter.full", ("adapter.parts",), trained)


def _preview_relations(preview: Any, train: Any) -> Iterator[Contradiction]:
    for key, what in (("prompts", "the prompts"), ("seeds", "the seeds")):
        if getattr(preview, key) != getattr(type(preview)(), key) and not train.preview_every_steps:
            text = f"preview.{key}: no previews are generated; set train.preview_every_steps or drop {what}"
            yield Contradiction(text, f"preview.{key}", ("train.preview_every_steps",))
    if preview.negative and preview.guidance == 1:
        text = "preview.negative: does nothing at preview.guidance=1, which turns guidance off; drop one of the two"
        yield Contradiction(text, "preview.negative", ("preview.guidance",))
        yield Contradiction(text, "preview.guidance", ("preview.negative",))


def _per_module_relations(sections: Mapping[str, Any]) -> Iterator[Contradiction]:
    for dotted in PER_MODULE:
        section, key = dotted.split(".")
        for text in getattr(sections[section], key):
            try:
                read_entry(dotted, text)
            except ConfigError as error:
                yield Contradiction(str(error))


def _evaluate_relations(evaluate: Any, data: Any) -> Iterator[Contradiction]:
    if evaluate.class_words and not evaluate.prompts:
        text = f"evaluate.class_words={evaluate.class_words}: fills {{class}} of evaluate.prompts, which is not set"
        yield Contradiction(text, "evaluate.class_words", ("evaluate.prompts",))
    if isinstance(data, SplitDataConfig):
        yield from _validation_relations(evaluate, data)
        return
    if evaluate.patience and not evaluate.every_steps:
        text = f"evaluate.patience={evaluate.patience}: there are no scores to wait for; set evaluate.every_steps"
        yield Contradiction(text, "evaluate.patience", ("evaluate.every_steps",))
    for key in ("after_training", "every_steps"):
        value = getattr(evaluate, key)
        if value and not evaluate.references:
            text = f"evaluate.{key}={as_written(value)}: needs evaluate.references, images to compare with"
            yield Contradiction(text, f"evaluate.{key}", ("evaluate.references",))


def _validation_relations(evaluate: Any, data: SplitDataConfig) -> Iterator[Contradiction]:
    for key in ("every_steps", "patience", "metrics"):
        value = getattr(evaluate, key)
        if value and data.validation is None:
            text = f"evaluate.{key}={as_written(value)}: needs data.validation, samples that are not trained on"
            yield Contradiction(text, f"evaluate.{key}", ("data.validation",))


def _output_relations(output: Any, train: Any) -> Iterator[Contradiction]:
    if output.thumbnail == "preview" and not train.preview_every_steps:
        text = "output.thumbnail=preview: no previews are generated; set train.preview_every_steps or name an image"
        yield Contradiction(text, "output.thumbnail", ("train.preview_every_steps",))
    if output.name is not None and ("/" in output.name or "\\" in output.name or output.name.startswith(".")):
        yield Contradiction(f"output.name={output.name}: must be a plain file name without folders")


def check_negative(negative: str, guidance: float | None) -> None:
    """Refuses the option --negative where nothing reads it.

    Args:
        negative: what images should not show.
        guidance: its scale; 1 turns it off, None is not known yet.

    Raises:
        ConfigError: guidance is off.
    """
    if negative and guidance is not None and guidance <= 1:
        raise ConfigError("--negative does nothing at --guidance 1, which turns guidance off; drop one of the two.")


def check_generation(
    prompts: Sequence[str], seeds: Sequence[int], negative: str, num_steps: int, guidance: float | None
) -> None:
    """Checks what images are generated with, as far as it does not depend on the base.

    Raises:
        ConfigError: a value is out of range, or a prompt is no text.
    """
    if not 1 <= num_steps <= MAX_DENOISING_STEPS:
        raise ConfigError(f"--steps {num_steps}: must be from 1 to {MAX_DENOISING_STEPS}.")
    if guidance is not None and not 1 <= guidance < math.inf:
        raise ConfigError(f"--guidance {guidance:g}: must be 1 (off) or greater.")
    check_negative(negative, guidance)
    for text in (*prompts, negative):
        if not is_text(text):
            raise ConfigError(f"{text!r} is not UTF-8; type the prompt in a terminal that is set to UTF-8.")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ConfigError(f"--seed {seed}: must be 0 or greater, and less than 2^63.")


def as_written(value: Any) -> str:
    """Returns a value as it stands in a config."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_written, value))}]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
