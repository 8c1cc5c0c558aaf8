"""A pickle gives its tensors without running its code, or one clear error."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_diffusion.compat.pickled import as_safetensors, load_pickle
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file

_TENSORS = {"lora_unet_x.lora_down.weight": torch.randn(2, 3), "lora_unet_x.alpha": torch.tensor(1.0)}


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [_TENSORS, OrderedDict(_TENSORS), {"state_dict": {"model": _TENSORS}}])
@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_come_out_bit_for_bit(content: Any, is_zip: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    tensors = load_pickle(path)
    assert tensors.keys() == _TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in _TENSORS.items())
    with as_safetensors(path) as copy:
        assert detect(parse_file(copy)) == "kohya"
    assert not copy.exists()


def test_tables_in_tables_are_joined(tmp_path: Path) -> None:
    torch.save({"unet": {"a": torch.ones(1)}, "text": {"b": torch.ones(2).expand(3, 2)[:1]}}, tmp_path / "a.bin")
    assert {name: tuple(t.shape) for name, t in load_pickle(tmp_path / "a.bin").items()} == {
        "unet.a": (1,),
        "text.b": (1, 2),
    }


def test_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    for write in (
        lambda: path.write_bytes(pickle.dumps(_Evil(tmp_path / "made"))),
        lambda: torch.save({"a": _Evil(tmp_path / "made")}, path),
    ):
        write()
        with pytest.raises(AdapterFileError, match="cannot be read without trusting it"):
            load_pickle(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": torch.ones(1), "epoch": 3}, "holds epoch of type int"),
        ([torch.ones(1)], "holds a value of type list"),
        ({1: torch.ones(1)}, "names a value 1"),
        ({}, "of type dict|no tensors"),
        ({"a": torch.ones(1).expand(10**6)}, "more numbers than it stores"),
        ({"a": torch.ones(2, 2).to_sparse()}, "no plain tensor"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "'a.b' twice"),
    ],
)
def test_all_else_is_refused(content: Any, text: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match=text):
        load_pickle(tmp_path / "a.pt")


def test_damage_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(_TENSORS, path)
    content = path.read_bytes()
    for end in range(0, len(content), 97):
        path.write_bytes(content[:end])
        with pytest.raises(AdapterFileError):
            load_pickle(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(AdapterFileError, match="compressed archive"):
        load_pickle(path)
    with pytest.raises(AdapterFileError, match="There is no file"):
        load_pickle(tmp_path / "none.pt")
