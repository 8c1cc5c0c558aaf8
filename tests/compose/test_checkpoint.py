"""Files are rewritten tensor by tensor, and nothing else in them changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion.compose.checkpoint import Place, check_space, open_checkpoint, rewrite, size_after, verify
from lora_diffusion.core.errors import ConfigError, ModelError, NonFiniteError, VerificationError
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.types import ModuleKey


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    tensors = {
        "half": torch.randn(3, 5).half(),
        "ids": torch.arange(7),
        "single": torch.tensor(0.5),
        "weight": torch.randn(4, 6),
        "bytes": torch.arange(3, dtype=torch.uint8),
    }
    save_file(tensors, path, {"about": "naïve", "modelspec.hash_sha256": "of the base"})
    return path


def double(tensor: torch.Tensor) -> torch.Tensor:
    return 2 * tensor.float()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_only_what_is_asked_changes(source: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    target = tmp_path / "target.safetensors"
    rewrite(source, target, {"weight": double}, dtype, {"made": "here"})
    verify(source, target, {"weight": double}, dtype)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = 2 * tensor if name == "weight" else tensor
        wanted = wanted.to(dtype) if dtype and tensor.is_floating_point() else wanted
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "about": "naïve", "made": "here"}
    tensor_bytes = sum(tensor.nbytes for tensor in after.values())
    assert size_after(source, dtype) == tensor_bytes
    assert target.stat().st_size > tensor_bytes


def test_a_wrong_bit_is_found(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    rewrite(source, target, {"weight": double}, None, {})
    with pytest.raises(VerificationError) as caught:
        verify(source, target, {"half": double}, None)
    assert set(caught.value.faults) == {"half", "weight"}
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(VerificationError, match="is the disk sound"):
        verify(source, target, {"weight": double}, None)


def test_what_the_number_type_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    def enlarge(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() + 1e6

    with pytest.raises(NonFiniteError, match=r"half would hold values that torch\.float16 cannot"):
        rewrite(source, tmp_path / "t", {"half": enlarge}, None, {})


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
    with checkpoint.reading() as read:
        assert read(query).shape == (2, 2)
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


def test_room_is_checked_before_writing(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "there", 1)
    with pytest.raises(ConfigError, match=r"needs 1000000000.00 GB, but .* left"):
        check_space(tmp_path / "not" / "there", 10**18)


def test_header_can_be_read_by_json(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    rewrite(source, target, {}, None, {})
    content = target.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["ids"]["shape"] == [7]
