"""`verify`, and what `export` and `train` make of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_diffusion.core.logs import logger
from lora_diffusion.workflows import verify
from tests.workflows.conftest import Commands


def test_written_file_is_sound_for_every_client(command: Commands, trained: Path, tiny_base: Path) -> None:
    result = json.loads(command.good("verify", trained / "run.safetensors", "--base", tiny_base, "--json").out)
    assert result["sound"]
    assert [app["client"] for app in result["clients"]] == ["comfyui", "a1111", "forge", "kohya", "diffusers"]
    assert all(app["num_applied"] == app["num_modules"] > 0 for app in result["clients"])
    for name in ("run.diffusers.safetensors", "run.peft"):
        command.good("verify", trained / name, "--base", tiny_base, "--client", "diffusers")


def test_errors_have_their_own_exit_codes(command: Commands, trained: Path, tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    renamed = {name.replace("lora_te_", "lora_te2_"): t for name, t in load_file(trained / "run.safetensors").items()}
    save_file(renamed, path)
    outcome = command("verify", path, "--base", tiny_base, "--client", "kohya", "--client", "comfyui")
    assert outcome.code == 1
    assert "text encoders of sd1 begin with lora_te_, not lora_te2_" in outcome.out
    assert "would not work as it is meant in kohya sd-scripts, ComfyUI" in outcome.message
    assert command("verify", path, "--base", tiny_base, "--client", "comfy").code == 2
    outcome = command("verify", trained / "run.safetensors")
    assert (outcome.code, "Name its base with --base, say --base tiny-sd" in outcome.message) == (2, True)
    path.write_bytes(path.read_bytes()[:-9])
    assert command("verify", path).code == 2


def test_full_size_file_needs_no_base(command: Commands, tmp_path: Path) -> None:
    path, stem = tmp_path / "a.safetensors", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 2048), f"{stem}.lora_up.weight": torch.ones(640, 2)}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(0.02)}, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    result = json.loads(command.good("verify", path, "--json").out)
    assert (result["base"], result["sound"]) == ("sdxl", True)


def test_export_is_refused_if_a_client_would_lose_something(command: Commands, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    outcome = command("export", trained, "--to", "diffusers", "--client", "comfyui", "--output", output)
    assert outcome.code == 1
    assert "ComfyUI: " in outcome.message
    assert not list(tmp_path.iterdir())
    command.good("export", trained, "--to", "kohya", "--output", output)
    command.good("export", trained, "--to", "kohya", "--client", "a1111", "--output", output, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_training_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    logger.propagate = True
    with caplog.at_level(logging.WARNING, logger="lora_diffusion"):
        verify.warn(Path("runs/a.safetensors"), ["ComfyUI: 2 modules. Do this"])
    assert set(caplog.messages) == {"a.safetensors: ComfyUI: 2 modules. Do this"}


@pytest.mark.parametrize("verb", ["verify", "convert", "resize", "compose", "merge", "generate", "evaluate"])
def test_every_command_names_another_base(verb: str, command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    (prompts := tmp_path / "prompts.txt").write_text("a cat")
    path, output, name = tmp_path / "a.safetensors", tmp_path / "b", "lora_unet_double_blocks_0_img_mod_lin"
    save_file({f"{name}.lora_down.weight": torch.ones(1, 3072), f"{name}.lora_up.weight": torch.ones(18432, 1)}, path)
    arguments = {
        "verify": (path, "--base", tiny_base),
        "convert": (path, output, "--to", "kohya"),
        "resize": (path, output, "--rank", 1),
        "compose": (f"{path}:1", "--output", output),
        "merge": ("--model", tiny_base, "--adapter", path, "--output", output),
        "generate": ("--model", tiny_base, "--adapter", path, "--prompt", "x", "--output", output),
        "evaluate": ("--model", tiny_base, "--adapter", path, "--prompts", prompts, "--output", output),
    }[verb]
    outcome = command(verb, *arguments)
    assert (outcome.code, "was made for FLUX.1, a kind" in outcome.message) == (2, True), outcome.message
