"""A folder that is easy to fill, and a family that needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from lora_diffusion.config.schema import ImageDataConfig
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.samples import PIECES, ImageText, Prepared
from lora_diffusion.data import image_folder

INFO = BaseInfo(resolution=64, size_step=8, architecture="tiny", prediction="epsilon", source="tiny base")


@dataclass
class Dataset:
    """A data folder under construction."""

    root: Path

    def image(self, name: str, caption: str | None = "a cat", size: tuple[int, int] = (64, 64), color="red") -> Path:
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

    def config(self, **settings) -> ImageDataConfig:
        return ImageDataConfig(path=str(self.root), **settings)

    def read(self, **settings) -> list[ImageText]:
        return image_folder.read(self.config(**settings), INFO)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    root = tmp_path / "images"
    root.mkdir()
    return Dataset(root)


@dataclass
class FakeFamily:
    """Keeps the mean colour of each view and the length of the caption; remembers whose it was asked for."""

    sample_type: ClassVar = ImageText
    version: str = "1"
    requested: list[list[str]] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def cache_key(self, options, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> str:
        return f"{self.version}{sorted(trained) if 'texts' in pieces else ''}"

    def prepare(self, loaded, samples, trained: frozenset[str], pieces: frozenset[str] = PIECES) -> list[Prepared]:
        items = [
            Prepared(sample.key, {}, f"{sample.size[0]}x{sample.size[1]}", sample.num_repeats) for sample in samples
        ]
        if "texts" in pieces:
            self.texts.append([sample.key for sample in samples])
            lengths = [torch.tensor(len(sample.captions[0])) for sample in samples]
            items = [replace(item, tensors={"length": own}) for item, own in zip(items, lengths, strict=True)]
        return self._look(samples, items) if "views" in pieces else items

    def _look(self, samples: Sequence[ImageText], items: list[Prepared]) -> list[Prepared]:
        self.requested.append([sample.key for sample in samples])
        pixels = torch.stack([sample.pixels for sample in samples])
        self.shapes.append(tuple(pixels.shape))
        means = pixels.mean((-2, -1))
        return [
            replace(item, tensors={**item.tensors, "mean": mean, "first_view": mean[0]})
            for item, mean in zip(items, means, strict=True)
        ]


@pytest.fixture
def family() -> FakeFamily:
    return FakeFamily()


@pytest.fixture
def loaded() -> Loaded:
    return Loaded({}, {}, None, torch.device("cpu"), INFO)
