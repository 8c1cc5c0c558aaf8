"""A folder that is easy to fill, and a family that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from lora_diffusion.config.schema import PictureDataConfig
from lora_diffusion.core.types import BaseInfo, ImageText, Loaded, Prepared
from lora_diffusion.data import sources

INFO = BaseInfo(resolution=64, size_step=8, architecture="tiny", prediction="epsilon", source="tiny base")


@dataclass
class Dataset:
    """A data folder under construction."""

    root: Path

    def picture(self, name: str, caption: str | None = "a cat", size: tuple[int, int] = (64, 64), color="red") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        if caption is not None:
            self.text(str(Path(name).with_suffix(".txt")), caption)
        return path

    def text(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def config(self, **settings) -> PictureDataConfig:
        return PictureDataConfig(path=str(self.root), **settings)

    def read(self, **settings) -> list[ImageText]:
        return sources.read(self.config(**settings), INFO)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    root = tmp_path / "pictures"
    root.mkdir()
    return Dataset(root)


@dataclass
class FakeFamily:
    """Keeps the mean colour of each view; remembers which samples it was asked for."""

    sample_type: ClassVar = ImageText
    version: str = "1"
    asked: list[list[str]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def cache_key(self, options, trained: frozenset[str]) -> str:
        return f"{self.version}{sorted(trained)}"

    def prepare(self, loaded, samples: Sequence[ImageText], trained: frozenset[str]) -> list[Prepared]:
        self.asked.append([sample.key for sample in samples])
        pixels = torch.stack([sample.pixels for sample in samples])
        self.shapes.append(tuple(pixels.shape))
        means = pixels.mean((-2, -1))
        return [
            Prepared(
                sample.key,
                {"mean": mean, "first_view": mean[0], "length": torch.tensor(len(sample.captions[0]))},
                f"{sample.size[0]}x{sample.size[1]}",
                sample.num_repeats,
            )
            for sample, mean in zip(samples, means, strict=True)
        ]


@pytest.fixture
def family() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def loaded() -> Loaded:
    return Loaded({}, {}, None, torch.device("cpu"), INFO)
