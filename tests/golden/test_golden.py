"""Adapter files of earlier releases load for ever. Each release adds a folder and never changes one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_diffusion.adapters.merge import delta_norm
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.families.sd1 import FAMILY, SD1Options
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.tensorfile.arrays import in_float32

FOLDER = Path(__file__).parent
RELEASES = sorted(path.name for path in FOLDER.iterdir() if (path / "tiny.safetensors").is_file())
# 2-norm over the modules of the Frobenius norms of their changes, as the release that wrote the file had them live.
NORMS = {"0.1.0": 0.006336}


def read(path: Path, base: Path) -> AdapterState:
    format_ = registry.find("formats", detect(parse_file(path)))
    return in_float32(format_.read(parse_file(path), FAMILY.key_map(format_.name, SD1Options(path=str(base)))))


def test_there_are_golden_files() -> None:
    assert RELEASES
    assert set(NORMS) == set(RELEASES)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.diffusers.safetensors", "tiny.peft"])
def test_golden_file_loads_with_the_same_change(release: str, name: str, tiny_base: Path) -> None:
    state = read(FOLDER / release / name, tiny_base)
    assert set(state.parts()) == {"unet", "text_encoder"}
    assert len(state.modules) == 40
    norm = sum(delta_norm(adapter) ** 2 for _, adapter in state) ** 0.5
    # Files hold fp16 numbers.
    assert norm == pytest.approx(NORMS[release], rel=2e-3)
