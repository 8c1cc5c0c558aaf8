"""A CLIP that is stored in transformers' format, with the calls of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.evaluation.encoding import CentreCrop, Preprocessing


class TransformersClip:
    """A CLIPModel, called as open_clip calls its models."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.parameters = model.parameters

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Returns [batch, dim] of normalised pixels [batch, 3, height, width]."""
        return self._model.get_image_features(pixel_values=pixels).pooler_output  # type: ignore[no-any-return]

    def encode_text(self, ids: Tensor, normalize: bool) -> Tensor:
        """Returns [batch, dim] of token ids [batch, length]."""
        vectors: Tensor = self._model.get_text_features(input_ids=ids).pooler_output
        return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


def load(name: str, device: str | torch.device) -> tuple[TransformersClip, Preprocessing, Any]:
    """Returns model, preprocessing, and what turns texts into ids [num_texts, length].

    Args:
        name: a folder, or a hub id.
        device: where the model computes.

    Raises:
        OSError: there is no such model, or its files are missing and cannot be fetched.
        ModelError: it is another kind of model.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

    kind = AutoConfig.from_pretrained(name, trust_remote_code=False).model_type
    if kind != "clip":
        raise ModelError(f"{name} is a model of the kind {kind}, not clip; scores need a CLIPModel of transformers.")
    model = CLIPModel.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False, weights_only=True, attn_implementation="sdpa"
    )
    model.to(device).eval()
    images = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    length = model.config.text_config.max_position_embeddings

    def tokenize(texts: Sequence[str]) -> Tensor:
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found.input_ids  # type: ignore[no-any-return]

    resize = CentreCrop(images.crop_size["height"], images.size["shortest_edge"])
    return TransformersClip(model), Preprocessing(resize, images.image_mean, images.image_std), tokenize
