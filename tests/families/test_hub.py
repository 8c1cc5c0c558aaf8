"""Bases by hub id, from a repository on this disk."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lora_diffusion.families.sd1 import FAMILY, SD1Options
from tests.tiny import tiny_pipeline


@pytest.mark.parametrize(
    ("saved", "unet"),
    [
        ([{}, {"variant": "fp16"}], ["diffusion_pytorch_model.safetensors"]),
        ([{"variant": "fp16"}], ["diffusion_pytorch_model.fp16.safetensors"]),
        ([{"max_shard_size": "40KB"}, {"variant": "fp16"}], None),
        ([{"max_shard_size": "40KB", "variant": "fp16"}], None),
    ],
    ids=["plain", "half", "pieces", "half in pieces"],
)
def test_only_the_best_weights_of_a_repository_are_fetched(
    saved: Sequence[dict[str, Any]], unet: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, cached = tmp_path / "repository", tmp_path / "cached"
    pipeline = tiny_pipeline()
    for options in saved:
        pipeline.save_pretrained(repository, **options)

    def snapshot_download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for file in (file for file in repository.rglob("*") if file.is_file()):
            key = file.relative_to(repository).as_posix()
            if any(fnmatch.fnmatch(key, pattern) for pattern in allow_patterns):
                (cached / key).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cached / key)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = SD1Options(path=f"someone/{tmp_path.name}")
    FAMILY.check(options)
    loaded = FAMILY.load(options, torch.device("cpu"))
    expected = pipeline.unet.state_dict()
    assert all(torch.allclose(value, expected[key]) for key, value in loaded.parts["unet"].state_dict().items())
    fetched = sorted(file.name for file in (cached / "unet").glob("*.safetensors"))
    halves = [".fp16" in name for name in fetched]
    assert fetched == unet if unet else len(fetched) > 1 and len(set(halves)) == 1
