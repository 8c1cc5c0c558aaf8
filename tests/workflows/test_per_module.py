"""Ranks, alphas and learning rates of single modules, from the plan to the files of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_diffusion.config.load import load
from lora_diffusion.core import registry
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._base_and_adapters import read_adapter
from tests.tiny_adapters import same
from tests.workflows.conftest import Commands, Killer

OWN = (
    "adapter.module_ranks=[unet/attn=8, text_encoder/ff=2, 're:.*attn2\\.to_(k|v)=3']",
    "adapter.module_alphas=[unet/ff=1]",
    "train.module_learning_rates=[unet/conv=3e-3, text_encoder/ff=2e-3]",
)


@pytest.fixture
def settings(tiny_base: Path, images: Path, tmp_path: Path) -> list[str]:
    return [
        *(f"model.path={tiny_base}", f"data.path={images}", f"cache.path={tmp_path / 'cache'}", *OWN),
        *("adapter.parts=[unet, text_encoder]", "adapter.targets=[attn, ff, unet/conv]", "adapter.rank=4"),
        *("train.max_steps=12", "train.save_every_steps=3", "train.learning_rate=1e-2", "train.precision=fp32"),
        *("train.threads=1", "output.name=adapter", "output.dtype=fp32", "output.formats=[kohya, diffusers, peft]"),
    ]


def _module(plan: dict[str, Any], ending: str) -> dict[str, Any]:
    return next(module for module in plan["modules"] if module["path"].endswith(ending))


def test_dry_run_lists_them(command: Commands, settings: list[str], tmp_path: Path) -> None:
    arguments = ["train", *settings, f"output.path={tmp_path / 'run'}", "--dry-run"]
    lines = command.good(*arguments).out.splitlines()
    conv = next(line for line in lines if "mid_block.resnets.0.conv1 " in line)
    assert "rank 4  alpha 4 " in conv
    assert conv.endswith("learning rate 0.003")
    to_k = next(line for line in lines if "mid_block" in line and "attn2.to_k " in line)
    assert "rank 3  alpha 3 " in to_k
    assert "learning rate" not in to_k
    plan = json.loads(command.good(*arguments, "--json").out)["plan"]
    assert [_module(plan, end)["rank"] for end in ("to_q", "to_k", "attn2.to_v", "net.2", "fc1")] == [8, 8, 3, 4, 2]
    assert (_module(plan, "net.2")["alpha"], _module(plan, "fc1")["learning_rate"]) == (1.0, 2e-3)
    assert _module(plan, "to_q")["learning_rate"] is None


def test_killed_run_ends_as_one_that_was_not(killer: Killer, settings: list[str], tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    arguments = ["train", *settings, f"output.path={killed}", "--resume"]
    log = tmp_path / "killed.log"
    assert killer.run(["train", *settings, f"output.path={calm}"]) == 0, log.read_text()
    assert killer.run(arguments, (f"{killed}/metrics.jsonl", 5, 0.0)) == -9, log.read_text()
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-000003"]
    assert killer.run(arguments) == 0, log.read_text()
    files = sorted(path.relative_to(calm) for path in (calm / "checkpoints" / "step-000012").glob("*.safetensors"))
    assert [file.name for file in files] == ["adapter.safetensors", "optimizer.safetensors"]
    assert all((calm / file).read_bytes() == (killed / file).read_bytes() for file in files)
    rates, losses = (
        [[json.loads(line)[key] for line in (run / "metrics.jsonl").open()] for run in (calm, killed)]
        for key in ("lr", "loss")
    )
    assert rates[0] == rates[1]
    assert losses[0] == losses[1]
    assert rates[0][0] > 9e-3  # of the part, not of the modules with their own


def test_files_of_a_run(command: Commands, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    command.good("train", *settings, f"output.path={run}", "train.part_learning_rates=unet=2e-2")
    config = load(run / "config.yaml")
    family = registry.find("families", "sd1")
    plan = json.loads((run / "plan.json").read_text())
    _, trained = _run_checkpoints.read(_run_checkpoints.at_step(run, 12))
    assert {(*key, each.rank, each.alpha) for key, each in trained} == {
        (module["part"], module["path"], module["rank"], module["alpha"]) for module in plan["modules"]
    }
    peft = read_adapter(run / "adapter.peft", family, config.model)
    assert same(peft, trained)
    record = json.loads((run / "adapter.peft" / "unet" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"], set(record["rank_pattern"].values())) == (4, 8.0, {3, 8})
    assert set(record["alpha_pattern"].values()) == {1.0, 3.0, 4.0}

    with safe_open(run / "adapter.safetensors", "pt") as file:
        result = file.metadata()
    assert (result["ss_network_dim"], result["ss_network_alpha"]) == ("8", "8")
    assert json.loads(result["ss_network_args"])["module_ranks"] == list(config.adapter.module_ranks)
    assert (result["ss_unet_lr"], result["ss_text_encoder_lr"]) == ("0.02", "0.001")
    assert json.loads(result["ss_network_args"])["module_learning_rates"] == ["unet/conv=3e-3", "text_encoder/ff=2e-3"]

    command.good("convert", run / "adapter.safetensors", tmp_path / "there", "--to", "peft", "--dtype", "fp32")
    command.good("convert", tmp_path / "there", tmp_path / "back.safetensors", "--to", "kohya", "--dtype", "fp32")
    first, again = load_file(run / "adapter.safetensors"), load_file(tmp_path / "back.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
