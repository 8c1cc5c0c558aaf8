"""Files are rewritten tensor by tensor, and nothing else in them changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_diffusion.core.errors import ModelError, NonFiniteError, VerificationError
from lora_diffusion.tensorfile.streaming import TensorFile


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
    dtypes = dict.fromkeys(("weight", "half"), dtype) if dtype else {}
    TensorFile(source).rewrite(target, {"weight": double}, dtypes, {"made": "here"})
    TensorFile(source).verify(target, {"weight": double}, dtypes)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wanted = 2 * tensor if name == "weight" else tensor
        wanted = wanted.to(dtypes.get(name, wanted.dtype))
        assert after[name].dtype == wanted.dtype
        assert torch.equal(after[name], wanted)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "about": "naïve", "made": "here"}
    tensor_bytes = sum(tensor.nbytes for tensor in after.values())
    assert TensorFile(source).size_as(dtypes) == tensor_bytes
    assert target.stat().st_size > tensor_bytes


def test_a_wrong_bit_is_found(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    TensorFile(source).rewrite(target, {"weight": double}, {}, {})
    with pytest.raises(VerificationError) as caught:
        TensorFile(source).verify(target, {"half": double}, {})
    assert set(caught.value.errors) == {"half", "weight"}
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(VerificationError, match="is the disk sound"):
        TensorFile(source).verify(target, {"weight": double}, {})


def test_what_the_number_type_cannot_hold_is_refused(source: Path, tmp_path: Path) -> None:
    def enlarge(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() + 1e6

    with pytest.raises(NonFiniteError, match=r"half would hold values that torch\.float16 cannot"):
        TensorFile(source).rewrite(tmp_path / "t", {"half": enlarge}, {}, {})


def test_header_can_be_read_by_json(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.safetensors"
    TensorFile(source).rewrite(target, {}, {}, {})
    content = target.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert json.loads(content[8 : 8 + length])["ids"]["shape"] == [7]


def test_single_tensors_are_those_of_the_library(source: Path) -> None:
    file, whole = TensorFile(source), load_file(source)
    assert file.tensors.keys() == whole.keys()
    for name, tensor in whole.items():
        read = file.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read, tensor)


def test_a_file_that_shrinks_is_refused(source: Path) -> None:
    file = TensorFile(source)
    source.write_bytes(source.read_bytes()[:-1])
    with pytest.raises(ModelError, match="no whole"):
        TensorFile(source)
    with pytest.raises(ModelError, match="cut off while it was read"):
        file.read(max(file.tensors, key=lambda name: file.tensors[name].start))
