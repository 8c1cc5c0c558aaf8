"""Images through a network, in batches: decoded in parallel while the network computes, normalised all at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from lora_diffusion.data.images import open_rgb

BATCH = 64
"""Images in one forward pass. The results depend on it in their last bits, so it is not a setting."""


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: resized and cropped by Pillow, then scaled and normalised in batches."""

    resize: Callable[[Image], Image]
    mean: Sequence[float]
    std: Sequence[float]

    def decode(self, source: Path | Image) -> np.ndarray[Any, Any]:
        """Returns one image, [height, width, 3] uint8."""
        image = open_rgb(source) if isinstance(source, Path) else source.convert("RGB")
        return np.asarray(self.resize(image))

    def normalise(self, pixels: Sequence[np.ndarray[Any, Any]], device: torch.device) -> Tensor:
        """Returns [batch, 3, height, width] float32, as ToTensor and Normalize of torchvision give it."""
        batch = torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (self.mean, self.std))
        return batch.sub_(mean).div_(std)


@dataclass(frozen=True)
class CentreCrop:
    """Scales an image until its shorter side is `shortest`, and cuts a square out of its centre."""

    side: int
    shortest: int

    def __call__(self, image: Image) -> Image:
        """Returns [side, side] pixels; bicubic, as CLIP and DINOv2 were trained."""
        scale = self.shortest / min(image.size)
        width, height = (max(self.shortest, int(length * scale)) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        resized = image.resize((width, height), Resampling.BICUBIC)
        return resized.crop((left, top, left + self.side, top + self.side))


def encode_images(
    forward: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    images: Sequence[Path | Image],
    device: torch.device,
) -> Tensor:
    """Returns what a network gives for each image as unit vectors, [num_images, dim] float32 on the CPU.

    The arguments are those of `network_outputs`.
    """
    return torch.nn.functional.normalize(network_outputs(forward, preprocessing, images, device), dim=-1)


@torch.no_grad()
def network_outputs(
    forward: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    images: Sequence[Path | Image],
    device: torch.device,
) -> Tensor:
    """Returns what a network gives for each image, [num_images, dim] float32 on the CPU.

    Args:
        forward: normalised pixels [batch, 3, height, width] -> [batch, dim].
        preprocessing: what the network wants.
        images: files or images; while a batch is in the network, the next one is decoded.
        device: where the network is.
    """
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    rows = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start(index: int) -> list[Future[np.ndarray[Any, Any]]]:
            return [pool.submit(preprocessing.decode, image) for image in batches[index]]

        ahead = start(0) if batches else []
        for index in range(len(batches)):
            pixels = [future.result() for future in ahead]
            ahead = start(index + 1) if index + 1 < len(batches) else []
            rows.append(forward(preprocessing.normalise(pixels, device)).float().cpu())
    return torch.cat(rows) if rows else torch.empty(0, 0)
