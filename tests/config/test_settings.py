"""Whether a setting may change on resume stands beside it, and all that ask read it there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_diffusion.config.describe import explained_yaml, fixed_differences
from lora_diffusion.config.load import load
from lora_diffusion.config.schema import Config, ModelOptions
from lora_diffusion.config.settings import FILLED, Choice, allowed_values, fixed, free, may_change
from lora_diffusion.core import registry
from lora_diffusion.data import sample_types
from lora_diffusion.training.checkpoint import BASE_PATH
from lora_diffusion.training.record import fingerprint
from lora_diffusion.training.trainer import Trainer

FREE = {
    *("model.path", "model.num_beams", "model.repetition_guard", "model.max_new_tokens", "model.temperature"),
    *("data.path", "data.skip_bad", "data.images"),
    *("train.max_steps", "train.epochs", "train.gradient_checkpointing", "train.threads", "train.tracker"),
    *("train.save_every_steps", "train.keep_checkpoints", "train.preview_every_steps"),
    *("train.save_adapter_every_steps", "train.save_adapter_every_epochs"),
}
"""Besides all of preview, evaluate, cache and output."""
WHOLE = ("preview", "evaluate", "cache", "output")


def settings(config: Config) -> Iterator[tuple[str, Any, str]]:
    for section in dataclasses.fields(Config):
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            yield section.name, values, field.name


@pytest.fixture(params=registry.available("families"))
def config(request: pytest.FixtureRequest) -> Config:
    return load(None, [f"model.family={request.param}", "model.path=a", "data.path=b", "output.path=c"])


def test_what_may_change_on_resume(config: Config) -> None:
    changeable = {f"{name}.{key}" for name, values, key in settings(config) if may_change(type(values), key)}
    every = {f"{name}.{key}" for name, _, key in settings(config)}
    assert changeable == {key for key in every if key in FREE or key.split(".")[0] in WHOLE}


def test_the_config_and_the_checkpoint_refuse_the_same_changes(config: Config, tmp_path: Path) -> None:
    family = registry.find("families", config.model.family)
    run: Any = SimpleNamespace(
        config=config,
        family=SimpleNamespace(cache_key=lambda *_: ""),
        sample_type=sample_types.find(family.sample_type),
        trained=frozenset(),
        info=SimpleNamespace(files=()),
        samples=(),
    )
    record = fingerprint(run)
    weights = {"unet": {"a.down": torch.nn.Parameter(torch.zeros(1, 1))}}
    record |= vars(Trainer(config.train, weights, lambda *_: None, tmp_path))["_fingerprint"]  # type: ignore[arg-type, return-value]
    for name, values, key in settings(config):
        other = dataclasses.replace(config, **{name: dataclasses.replace(values, **{key: "changed"})})
        is_fixed = bool(fixed_differences(config, other))
        assert is_fixed is not may_change(type(values), key)
        # Data is compared by its content, and a base by its networks.
        if name in ("model", "adapter", "train") and f"{name}.{key}" != BASE_PATH:
            assert (f"{name}.{key}" in record) is is_fixed


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    path: str = "builtin:own"
    guess: int = 3
    rank: int = fixed(4)
    speed: int = free(5)


def test_a_class_that_gives_another_default_keeps_the_rest() -> None:
    assert Options().path == "builtin:own"
    assert allowed_values(Options, "path") is FILLED
    assert [may_change(Options, key) for key in ("path", "guess", "rank", "speed")] == [True, False, False, True]


def test_choices_of_the_registry_are_listed(config: Config) -> None:
    explanation = " ".join(explained_yaml(config).replace("#", "").split())
    for name, values, key in settings(config):
        rule = allowed_values(type(values), key)
        if isinstance(rule, Choice) and rule.group:
            assert f"Known: {', '.join(registry.available(rule.group))}." in explanation, f"{name}.{key}"
