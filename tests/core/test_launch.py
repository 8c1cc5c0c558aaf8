"""What accelerate tells by the environment: honoured or refused."""

from __future__ import annotations

import json

import pytest
import torch

from lora_diffusion.core import launch
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.runtime.device import compute_dtype, process_group

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo"),
    ],
)
def test_what_is_not_done_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"accelerate was told to use .*{reason}.*not supported"):
        process_group()
    monkeypatch.setenv(name, "no" if "DYNAMO" in name else "false")
    launch.check()


@pytest.mark.parametrize(
    ("requested", "precision", "is_right"),
    [
        ("no", "auto", True),
        ("no", "bf16", True),
        ("bf16", "auto", True),
        ("fp16", "fp16", True),
        ("bf16", "fp32", False),
        ("fp8", "auto", False),
        ("fp8", "fp32", False),
    ],
)
def test_precision(monkeypatch: pytest.MonkeyPatch, requested: str, precision: str, is_right: bool) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", requested)
    if is_right:
        launch.check_training(precision, 1)
    else:
        with pytest.raises(ConfigError, match=rf"told to use {requested}.*train.precision={precision}"):
            launch.check_training(precision, 1)


def test_precision_of_the_launcher_is_taken_where_the_config_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert compute_dtype("auto", CPU) == torch.float16
    assert compute_dtype("fp32", CPU) == torch.float32


def test_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    launch.check_training("auto", 4)
    with pytest.raises(ConfigError, match=r"accumulate 4 gradients.*train\.gradient_accumulation=4"):
        launch.check_training("auto", 1)


def test_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (launch.num_processes(), launch.process_index()) == (1, 0), "no launcher told the place on the machine"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (launch.num_processes(), launch.process_index()) == (2, 1)
    assert launch.is_lost_process(RuntimeError("[/third_party/gloo/pair.cc:5] Connection closed by peer"))
    assert not launch.is_lost_process(RuntimeError("shapes differ"))


def test_commands_of_one_process_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_diffusion.cli.main import main

    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main(["config", "show"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert json.dumps(launch.launcher_precision()) == "null"
