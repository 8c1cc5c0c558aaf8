"""Pictures of stage 1 as tensors, and the augmentation of every training stage."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.build_builtin.sources import TRAINING_STYLES, UNSEEN_STYLE
from scripts.build_builtin.subjects import Subject, read_subjects, visible


@dataclass(frozen=True)
class Pictures:
    """Pictures with their subjects; `pixels` is [n, 3, size, size] uint8."""

    pixels: Tensor
    subjects: Sequence[Subject]
    styles: Sequence[str]

    def select(self, indices: Sequence[int]) -> "Pictures":
        """The pictures at `indices`, in that order."""
        return Pictures(
            self.pixels[torch.tensor(indices)],
            [self.subjects[i] for i in indices],
            [self.styles[i] for i in indices],
        )

    def __add__(self, other: "Pictures") -> "Pictures":
        """These pictures, then the others of the same size."""
        pixels = torch.cat([self.pixels, other.pixels])
        return Pictures(pixels, [*self.subjects, *other.subjects], [*self.styles, *other.styles])

    def __len__(self) -> int:
        return len(self.subjects)


def read_pictures(work: Path, pixels: int = 64, name: str = "pictures") -> Pictures:
    """All rendered pictures of that name, box-filtered to `pixels` (a divisor of 128), as [n, 3, pixels, pixels]."""
    rows = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    drawn = torch.from_numpy(np.load(work / f"{name}.npz")["pictures"]).permute(0, 3, 1, 2)
    factor = drawn.shape[-1] // pixels
    small = torch.cat([F.avg_pool2d(part.float(), factor).round().to(torch.uint8) for part in drawn.split(256)])
    subjects = {subject.name: subject for subject in read_subjects()}
    return Pictures(small, [subjects[row["name"]] for row in rows], [row["style"] for row in rows])


def training_pictures(pictures: Pictures, model: str) -> Pictures:
    """What `model` may be trained on: its subjects, in the training styles."""
    names = {subject.name for subject in visible(read_subjects(), model)}
    rows = range(len(pictures))
    return pictures.select(
        [i for i in rows if pictures.styles[i] in TRAINING_STYLES and pictures.subjects[i].name in names]
    )


def unseen_style_pictures(pictures: Pictures) -> Pictures:
    """The pictures of the style that no model sees."""
    return pictures.select([i for i in range(len(pictures)) if pictures.styles[i] == UNSEEN_STYLE])


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in -1..1."""
    return pixels.float() / 127.5 - 1


@dataclass(frozen=True)
class Affine:
    """Ranges of a random affine change: degrees, scale, shift as a share of the width, chance of a mirror image."""

    degrees: float
    scale: tuple[float, float]
    shift: float
    mirror: float

    def apply(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Changed copies of [n, 3, h, w] images in -1..1; what comes into view is white."""
        count = images.shape[0]

        def uniform(low: float, high: float) -> Tensor:
            return torch.rand(count, generator=rng) * (high - low) + low

        angle = uniform(-self.degrees, self.degrees) * (torch.pi / 180)
        zoom = 1 / uniform(*self.scale)
        sign = torch.where(torch.rand(count, generator=rng) < self.mirror, -1.0, 1.0)
        cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows = torch.stack(
            [
                torch.stack([cosine * sign, -sine, uniform(-2 * self.shift, 2 * self.shift)], 1),
                torch.stack([sine * sign, cosine, uniform(-2 * self.shift, 2 * self.shift)], 1),
            ],
            1,
        )
        grid = F.affine_grid(rows, list(images.shape), align_corners=False)
        return F.grid_sample(images - 1, grid, padding_mode="zeros", align_corners=False) + 1


def disturb_colours(images: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Images with every colour channel's darkness scaled at random; white stays white."""
    gain = 1 + (torch.rand(images.shape[0], 3, 1, 1, generator=rng) * 2 - 1) * strength
    return (1 - (1 - images) * gain).clamp(-1, 1)


def blur_some(images: Tensor, probability: float, rng: torch.Generator) -> Tensor:
    """Images of which some are smoothed by a 3x3 box."""
    chosen = torch.rand(images.shape[0], 1, 1, 1, generator=rng) < probability
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(chosen, soft, images)


def cut_out(images: Tensor, probability: float, rng: torch.Generator) -> Tensor:
    """Images of which some lose a rectangle, replaced by one random colour."""
    count, _, height, width = images.shape
    chosen = torch.rand(count, generator=rng) < probability
    centre = torch.rand(count, 2, generator=rng)
    half = torch.rand(count, 2, generator=rng) * 0.15 + 0.05
    y = torch.linspace(0, 1, height)[None, :]
    x = torch.linspace(0, 1, width)[None, :]
    inside = ((y - centre[:, :1]).abs() < half[:, :1])[:, :, None] & ((x - centre[:, 1:]).abs() < half[:, 1:])[
        :, None, :
    ]
    colour = torch.rand(count, 3, 1, 1, generator=rng) * 2 - 1
    return torch.where((inside & chosen[:, None, None])[:, None], colour, images)
