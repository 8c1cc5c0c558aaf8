"""The CLIP that scores pictures. It is never the one that the base model reads its prompts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import builtin_path

_BUILTIN = {"builtin:emoji-clip": "emoji-clip"}
_BATCH = 64


@dataclass(frozen=True)
class Clip:
    """An open_clip model with its picture transform and tokenizer."""

    name: str
    """What the scores are stated with: scores of two CLIPs cannot be compared."""
    model: Any
    transform: Any
    tokenizer: Any

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Returns unit vectors, [num_images, dim] float32 on the CPU."""
        device = next(self.model.parameters()).device
        rows = [
            self.model.encode_image(
                torch.stack([self.transform(image.convert("RGB")) for image in images[start : start + _BATCH]]).to(
                    device
                ),
                normalize=True,
            )
            for start in range(0, len(images), _BATCH)
        ]
        return torch.cat(rows).float().cpu()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Returns unit vectors, [num_texts, dim] float32 on the CPU; equal texts are encoded once."""
        device = next(self.model.parameters()).device
        distinct = list(dict.fromkeys(texts))
        rows = self.model.encode_text(self.tokenizer(distinct).to(device), normalize=True).float().cpu()
        return rows[[distinct.index(text) for text in texts]]  # type: ignore[no-any-return]


def load_clip(name: str = "builtin:emoji-clip", device: str = "cpu") -> Clip:
    """Loads a CLIP: builtin:emoji-clip, an open_clip folder, or "model/pretrained" as open_clip names them.

    Raises:
        ModelError: open_clip does not know it, or its files are missing.
    """
    import open_clip

    if name in _BUILTIN:
        source = f"local-dir:{builtin_path(_BUILTIN[name])}"
    elif Path(name).is_dir():
        source = f"local-dir:{Path(name).resolve()}"
    else:
        source = name
    architecture, _, tag = (source, "", "") if source.startswith("local-dir:") else source.partition("/")
    try:
        model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=tag or None, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"The CLIP {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    return Clip(name, model.eval(), transform, tokenizer)
