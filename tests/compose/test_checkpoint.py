"""Weights of modules are found in folders and single files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_diffusion.compose.checkpoint import Place, check_space, open_checkpoint
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ConfigError, ModelError
from lora_diffusion.core.keymap import KeyMap


def test_a_third_of_a_fused_tensor_and_a_transposed_one() -> None:
    fused = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(Place(Path(), "x", "k").view(fused), fused[2:4])
    assert torch.equal(Place(Path(), "x", "t").view(fused), fused.T)
    view = Place(Path(), "x", "v").view(fused)
    view += 1
    assert fused[4, 0] == 9


def test_single_file_is_found_by_its_names(tmp_path: Path) -> None:
    query, plain = ModuleKey("text_encoder_2", "q_proj"), ModuleKey("unet", "conv_in")
    path = tmp_path / "model.safetensors"
    save_file({"t.attn.in_proj_weight": torch.ones(6, 2), "u.conv.weight": torch.ones(2, 2)}, path)
    names = KeyMap([(query, "t.attn.in_proj_weight#q"), (plain, "u.conv"), (ModuleKey("unet", "none"), "u.none")])
    checkpoint = open_checkpoint(path, ["unet"], names)
    assert checkpoint.places(query) == (Place(path, "t.attn.in_proj_weight", "q"),)
    assert checkpoint.places(plain) == (Place(path, "u.conv.weight"),)
    assert checkpoint.read(query).shape == (2, 2)
    with pytest.raises(ModelError, match="has no weight of unet/none"):
        checkpoint.places(ModuleKey("unet", "none"))


@pytest.mark.parametrize("saved", ["text_model.encoder.fc1", "encoder.fc1"])
@pytest.mark.parametrize("live", ["text_model.encoder.fc1", "encoder.fc1"])
def test_folder_is_found_under_both_names_of_clip(tmp_path: Path, saved: str, live: str) -> None:
    key = ModuleKey("text_encoder", live)
    for name in ("model.safetensors", "model.fp16.safetensors"):
        (tmp_path / "text_encoder").mkdir(exist_ok=True)
        save_file({f"{saved}.weight": torch.ones(2, 2)}, tmp_path / "text_encoder" / name)
    checkpoint = open_checkpoint(tmp_path, ["unet", "text_encoder"], KeyMap([(key, "any")]))
    assert [place.file.name for place in checkpoint.places(key)] == ["model.fp16.safetensors", "model.safetensors"]


def test_nothing_to_open(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no networks"):
        open_checkpoint(tmp_path, ["unet"], KeyMap([]))
    (tmp_path / "cut.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ModelError, match=r"no whole \.safetensors file"):
        open_checkpoint(tmp_path / "cut.safetensors", ["unet"], KeyMap([]))


def test_disk_space_is_checked_before_writing(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ConfigError, match=r"needs 1000000000.00 GB, but .* left"):
        check_space(tmp_path / "not" / "there", 10**18)
