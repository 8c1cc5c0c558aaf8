"""What `verify` says of hundreds of files with errors drawn at random is what diffusers and PEFT do with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.verify import verify
from lora_diffusion.formats.parsed_file import parse_file
from scripts.apps.agreement import compare
from scripts.apps.diffusers_loader import Diffusers
from scripts.apps.mutations import draw
from scripts.apps.peft_loader import Peft, draw_folder
from tests.compat.test_verify import _base_of
from tests.tiny import tiny_pipeline
from tests.tiny_adapters import tiny_loaded

_PIECES = 4
_FILES, _FOLDERS = 50, 25
"""In each piece."""


@pytest.fixture(scope="module")
def base() -> Base:
    return _base_of(tiny_loaded().parts, "sd1")


@pytest.fixture(scope="module")
def diffusers() -> Diffusers:
    return Diffusers(tiny_pipeline)


@pytest.fixture(scope="module")
def peft() -> Peft:
    return Peft(lambda: tiny_pipeline().unet)


@pytest.mark.parametrize("piece", range(_PIECES))
def test_diffusers_does_with_mutated_files_what_is_said(
    piece: int, base: Base, diffusers: Diffusers, tmp_path: Path
) -> None:
    path, others = tmp_path / "a.safetensors", []
    for seed in range(piece * _FILES, (piece + 1) * _FILES):
        tensors, label = draw(base, seed)
        save_file(tensors, path)
        others += _differs(path, base, diffusers, f"{seed} [{label}]")
    assert others == []


@pytest.mark.parametrize("piece", range(_PIECES))
def test_peft_does_with_mutated_folders_what_is_said(piece: int, base: Base, peft: Peft, tmp_path: Path) -> None:
    others = []
    for seed in range(piece * _FOLDERS, (piece + 1) * _FOLDERS):
        label = draw_folder(base, seed, tmp_path)
        others += _differs(tmp_path, base, peft, f"{seed} [{label}]")
    assert others == []


def _differs(path: Path, base: Base, program: Any, label: str) -> list[str]:
    (result,) = verify(match_file(parse_file(path), base), [program.name])
    json.dumps(result.to_json())
    agreement = compare(match_file(parse_file(path), base), result, program.load(path))
    return [] if agreement.is_whole else [f"{label}: {agreement.text()}"]
