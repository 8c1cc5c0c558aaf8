"""DINOv2 as a scorer of likeness: it sees what CLIP takes for the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import user_path
from lora_diffusion.core.model_folder import check_model_folder
from lora_diffusion.core.text import shown
from lora_diffusion.scoring.image_encoding import CentreCrop, Preprocessing, encode_images

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, as in preprocessor_config.json of facebook/dinov2-base."""


@dataclass(frozen=True)
class Dino:
    """A Dinov2Model of transformers."""

    name: str
    model: Any
    preprocessing: Preprocessing

    def encode_images(self, images: Sequence[Path | Image]) -> Tensor:
        """Returns the class tokens as unit vectors, [num_images, dim] float32 on the CPU."""
        return encode_images(
            lambda pixels: self.model(pixels).last_hidden_state[:, 0], self.preprocessing, images, self.model.device
        )


def load_dino(name: str, device: str | torch.device = "cpu") -> Dino:
    """Loads a DINOv2 from a folder or by its hub id, say facebook/dinov2-base.

    Raises:
        ModelError: there is none, or its files are missing and cannot be fetched.
    """
    from transformers import Dinov2Model

    model_class: Any = Dinov2Model

    folder = user_path(name, "--scorer dino")
    check_model_folder(folder, f"--scorer dino={name}")
    try:
        model, report = model_class.from_pretrained(
            folder if folder.is_dir() else name,
            trust_remote_code=False,
            weights_only=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:  # what libraries raise on wrong files is of every type
        raise ModelError(
            f"--scorer dino={name} cannot be loaded: {_first_line(error)} Give a folder that holds a "
            "Dinov2Model of transformers, or a hub id such as facebook/dinov2-base; without a network, its files must "
            "have been fetched before."
        ) from error
    if report["missing_keys"]:
        raise ModelError(f"--scorer dino={name} is no DINOv2: it lacks {len(report['missing_keys'])} of its tensors.")
    return Dino(name, model.to(device).eval(), _preprocessing(model.config))


def _first_line(error: Exception) -> str:
    return shown(next(iter(str(error).splitlines()), type(error).__name__), 300)


def _preprocessing(config: Any) -> Preprocessing:
    """Gives 224 pixels out of 256, as the published ones are used; less to smaller models."""
    side = min(224, config.image_size) // config.patch_size * config.patch_size
    return Preprocessing(CentreCrop(side, round(side * 256 / 224)), _MEAN, _STD)
