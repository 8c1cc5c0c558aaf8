"""Arrays hold what the safetensors library and torch hold, to the last bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save

from lora_diffusion.core.errors import AdapterFileError, NonFiniteError
from lora_diffusion.formats.metadata import hashes
from lora_diffusion.tensorfile import arrays, safetensors_file

FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn")
_RNG = torch.Generator().manual_seed(0)
TENSORS = {
    **{name: torch.randn(3, 2, generator=_RNG).to(getattr(torch, name)) for name in FLOATS},
    **{name: torch.tensor([1, 0]).to(getattr(torch, name)) for name in ("bool", "uint8", "int8", "int16", "int32")},
    "whole": torch.tensor([2**40]),
    "b": torch.tensor(1.5),
    "a": torch.ones(2, 1, 3, 3).half(),
    "empty": torch.ones(0, 4),
}


def _arrays_of(tensors: dict[str, torch.Tensor]) -> dict[str, arrays.Array]:
    return {name: arrays.as_array(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [{}, {"ss_seed": "1", "ünicode": '"\n'}])
def test_file_is_that_of_the_library(metadata: dict[str, str], tmp_path: Path) -> None:
    safetensors_file.save(_arrays_of(TENSORS), metadata, tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_size == len(save(TENSORS, metadata))
    if len(metadata) < 2:  # the library keeps several texts in no order
        assert (tmp_path / "ours").read_bytes() == save(TENSORS, metadata)
    again = safetensors_file.load_unchecked(tmp_path / "ours")
    assert list(again) == list(load_file(tmp_path / "ours"))
    for name, tensor in TENSORS.items():
        assert arrays.same_bits(again[name], arrays.as_array(tensor))
        assert arrays.to_torch(again[name]).dtype == tensor.dtype


@pytest.mark.parametrize("name", FLOATS)
def test_numbers_are_those_of_torch(name: str) -> None:
    tensor = TENSORS[name]
    array = arrays.as_array(tensor)
    assert torch.equal(torch.from_numpy(arrays.upcast(array)), tensor.float())
    assert arrays.is_finite(array)
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoilt = tensor.clone()
        spoilt[1, 1] = torch.tensor(bad).to(tensor.dtype)
        if not bool(torch.isfinite(spoilt.float()).all()):  # float8_e4m3fn has no infinity
            assert not arrays.is_finite(arrays.as_array(spoilt))
    largest = torch.full((2,), torch.finfo(tensor.dtype).max, dtype=torch.float64).to(tensor.dtype)
    assert arrays.is_finite(arrays.as_array(largest))


def test_memory_of_another_layout_is_stored_in_order() -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    assert numpy.array_equal(safetensors_file.cast("m", turned, None), turned.numpy())
    assert bytes(arrays.raw(safetensors_file.cast("m", turned, torch.bfloat16))) == bytes(
        arrays.raw(arrays.as_array(turned.contiguous().bfloat16()))
    )


def test_what_no_file_can_hold_is_refused() -> None:
    with pytest.raises(AdapterFileError, match="complex64"):
        arrays.as_array(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(NonFiniteError, match=r"values up to 70000, which torch.float16 cannot hold"):
        safetensors_file.cast("m", torch.tensor([7e4]), torch.float16)
    with pytest.raises(NonFiniteError, match="m holds NaN"):
        safetensors_file.cast("m", numpy.array([numpy.nan], numpy.float32), None)


def test_hashes_of_a_file_without_texts_of_kohya() -> None:
    """The library writes empty metadata too, which moves all that the older hash covers."""
    tensors = {"b": torch.randn(600_000, generator=_RNG), "a": torch.ones(3).half()}
    content = save(tensors, {})
    told = hashes(_arrays_of(tensors), {"modelspec.title": "t"})
    assert told["sshs_legacy_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    by_name = _arrays_of(tensors)["a"].tobytes() + _arrays_of(tensors)["b"].tobytes()
    assert told["modelspec.hash_sha256"] == f"0x{hashlib.sha256(by_name).hexdigest()}"
