"""What a training step of models with text output calls, without numbers: for its memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from lora_diffusion.core.base_model import Example
from lora_diffusion.families.model_files import read_json


class Head(nn.Module):
    """What the same takes, on the meta device: the layer that gives the logits, and the cross-entropy of all tokens."""

    def __init__(self, vocabulary: int, width: int, *, is_tied: bool) -> None:
        """Makes the layer; `is_tied` if its weight is that of the embedding, and in memory already."""
        super().__init__()
        weight = torch.empty(vocabulary, width, device="meta")
        if is_tied:
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        """Returns the cross-entropy of each token; `hidden` is [tokens, width]."""
        logits = linear(hidden, self.weight).float()
        return (cross_entropy(logits, torch.zeros_like(hidden[:, 0], dtype=torch.int64), reduction="none"),)


def speech_example(encoder: Any, batch_size: int, size: tuple[int, int]) -> Example:
    """Returns what a training step calls on transcripts of `size[1]` tokens; features are always of full length."""
    config = encoder.config
    width, length = config.d_model, min(max(size[1], 1), config.max_target_positions)
    with torch.device("meta"):
        inputs: dict[str, dict[str, Any]] = {
            "encoder": {
                "input_features": torch.empty(batch_size, config.num_mel_bins, 2 * config.max_source_positions)
            },
            "decoder": {
                "input_ids": torch.zeros(batch_size, length, dtype=torch.int64),
                "encoder_hidden_states": torch.empty(batch_size, config.max_source_positions, width),
                # Without a mask of its own, transformers looks into position ids, which hold no values here.
                "attention_mask": torch.zeros(batch_size, 1, length, length),
                "use_cache": False,
            },
            "head": {"hidden": torch.empty(batch_size * length, width)},
        }
    return Example(inputs, {"head": Head(config.vocab_size, width, is_tied=True)})


def chat_example(
    parts: Mapping[str, Any], folder: Path, trained: frozenset[str], batch_size: int, size: tuple[int, int]
) -> Example:
    """Returns what a training step calls on conversations of `size`: tokens, and images of each."""
    config = read_json(folder / "config.json")
    vision = parts["vision_tower"].config
    # The image as a whole and the tiles of its largest grid.
    grids = config.get("image_grid_pinpoints") or []
    length, num_images = size
    tiles = num_images * (1 + max((h * w // vision.image_size**2 for h, w in grids), default=0))
    patches = (vision.image_size // vision.patch_size) ** 2
    width = parts["projector"].linear_1.in_features
    text = parts["language_model"].config
    hidden = text.hidden_size
    with torch.device("meta"):
        pixels = {"pixel_values": torch.empty(batch_size * tiles, 3, vision.image_size, vision.image_size)}
        inputs: dict[str, dict[str, Any]] = {
            **({"vision_tower": pixels} if "vision_tower" in trained else {}),
            "projector": {"image_features": torch.empty(batch_size * tiles, patches, width)},
            "language_model": {
                "inputs_embeds": torch.empty(batch_size, length, hidden),
                # Without a mask of its own, transformers looks into position ids, which hold no values here.
                "attention_mask": torch.zeros(batch_size, 1, length, length),
                "use_cache": False,
            },
            # At most, all but the image is an answer.
            "head": {"hidden": torch.empty(batch_size * max(length - num_images * patches, 1), hidden)},
        }
    return Example(inputs, {"head": Head(text.vocab_size, hidden, is_tied=text.tie_word_embeddings)})
