import json
from pathlib import Path
from typing import Any

import pytest

from lora_diffusion.cli.main import main
from lora_diffusion.config.load import load
from lora_diffusion.workflows.estimate import estimate
from tests.tiny import save_tiny_sdxl_pipeline
from tests.tiny_llava import entry, save_tiny_llava, write_chats, write_picture
from tests.workflows.conftest import Commands


def estimated(base: Path, *overrides: str) -> Any:
    values = [f"model.path={base}", "data.path=unused", "output.path=unused", "adapter.rank=4", "train.precision=fp32"]
    return estimate(load(None, [*values, "model.dtype=fp32", *overrides]))


def test_parts_are_what_they_must_be(tiny_base: Path) -> None:
    actual = estimated(tiny_base, "adapter.rank=2")
    numbers = actual.plan.num_parameters
    assert actual.memory.adapter_bytes == actual.memory.gradient_bytes == 4 * numbers
    assert actual.memory.optimizer_bytes == 8 * numbers
    assert actual.memory.weights_bytes == 4 * actual.plan.part_sizes["unet"]
    assert actual.memory.total_bytes == sum(actual.memory.parts().values())
    assert actual.size == (16, 16)


@pytest.mark.parametrize(
    ("overrides", "part", "factor"),
    [
        (["model.dtype=bf16"], "frozen weights", (0.5, 0.5)),
        (["model.quantization=8bit"], "frozen weights", (0.3, 0.9)),
        (["model.quantization=nf4"], "frozen weights", (0.1, 0.35)),
        (["train.batch_size=4"], "activations", (3.0, 4.3)),
        (["model.prior_weight=1"], "activations", (1.7, 2.1)),
        (["data.resolution=32"], "activations", (3.0, 4.5)),
        (["train.gradient_checkpointing=true"], "activations", (0.3, 0.9)),
        (["adapter.rank=8"], "adapter", (2.0, 2.0)),
        (["adapter.module_ranks=attn=8"], "adapter", (2.0, 2.0)),
        (["adapter.module_ranks=[attn=8]", "train.module_learning_rates=attn=1e-5"], "optimizer", (2.0, 2.0)),
    ],
)
def test_settings_change_what_they_should(
    tiny_base: Path, overrides: list[str], part: str, factor: tuple[float, float]
) -> None:
    plain, changed = estimated(tiny_base).memory.parts(), estimated(tiny_base, *overrides).memory.parts()
    assert factor[0] * plain[part] <= changed[part] <= factor[1] * plain[part]


def test_trained_encoders_count(tmp_path: Path) -> None:
    base = save_tiny_sdxl_pipeline(tmp_path / "base")
    alone, both = (
        estimated(base, "model.family=sdxl", f"adapter.parts={parts}").memory
        for parts in ("[unet]", "[unet, text_encoder, text_encoder_2]")
    )
    assert both.weights_bytes > alone.weights_bytes
    assert both.activation_bytes > alone.activation_bytes


def test_only_what_is_trained_and_what_lies_behind_it_counts(tmp_path: Path) -> None:
    base, image = save_tiny_llava(tmp_path / "base"), write_picture(tmp_path / "data" / "a.png", 0).name
    write_chats(tmp_path / "data", [entry(image, "What?", "cat " * 9)])
    values = [f"model.path={base}", f"data.path={tmp_path / 'data'}", "output.path=unused", "model.family=llava"]
    model, projector, both = (
        estimate(load(None, [*values, "train.batch_size=8", "adapter.rank=1", f"adapter.parts=[{parts}]"]))
        for parts in ("language_model", "projector", "language_model, projector")
    )
    assert model.memory.activation_bytes < 0.8 * both.memory.activation_bytes
    assert projector.memory.activation_bytes > 0.8 * both.memory.activation_bytes


def test_frozen_unet_has_no_gradients_of_its_own(tiny_base: Path) -> None:
    alone, both = (
        estimated(tiny_base, f"adapter.parts={parts}") for parts in ("[text_encoder]", "[unet, text_encoder]")
    )
    assert alone.memory.activation_bytes < 1.05 * both.memory.activation_bytes


def test_command_prints_json(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [f"model.path={tiny_base}", "data.path=unused", "output.path=unused"]
    assert main(["estimate", *values, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["total_bytes"] == sum(value for key, value in printed.items() if key.endswith("_bytes")) / 2


def test_what_decides_nothing_need_not_be_given(command: Commands, tiny_base: Path) -> None:
    values = ("train.precision=fp32", "model.dtype=fp32", f"model.path={tiny_base}")
    result = json.loads(command.good("estimate", *values, "--json").out)
    assert result["total_bytes"] > 0
    outcome = command("estimate", "model.family=whisper", "model.path=builtin:digits")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "data.path: must be given" in outcome.message
    outcome = command("estimate")
    assert (outcome.code, "model.path: must be given" in outcome.message, "data.path" in outcome.message) == (
        2,
        True,
        False,
    )
