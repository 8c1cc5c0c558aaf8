"""The loss of models with text output: what is drawn, and the cross-entropy of labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_diffusion.core.base_model import Loaded, LossOutput
from lora_diffusion.core.samples import Batch
from lora_diffusion.families.language import speech, vision
from lora_diffusion.families.language.loading import IGNORED


@dataclass(frozen=True)
class DrawnSpeech:
    """All that is random of a training step on recordings, on the CPU."""

    features: Tensor
    """[batch, mels, frames], masked."""
    labels: Tensor
    """[batch, tokens]."""


@dataclass(frozen=True)
class DrawnChats:
    """All that is random of a training step on conversations, on the CPU."""

    images: Tensor
    """Pixels [tiles, 3, height, width] for a trained image encoder, else features [tiles, patches, width]."""
    is_pixels: bool
    num_tiles: list[int]
    """Of each image, in the order of the samples."""
    image_size: Tensor
    """[images, 2], height and width."""
    input_ids: Tensor
    """[batch, tokens]."""
    labels: Tensor
    """[batch, tokens]."""


def draw_speech(loaded: Loaded, batch: Batch, rng: torch.Generator) -> DrawnSpeech:
    """Draws one view of each recording, and what of it is masked."""
    views, num_frames, labels = (batch.tensors[name] for name in ("features", "num_frames", "labels"))
    rows = torch.arange(len(batch))
    chosen = torch.randint(views.shape[1], (len(batch),), generator=rng)
    features = speech.mask(views[rows, chosen], num_frames[rows, chosen], loaded.options, rng)
    return DrawnSpeech(features, labels)


def speech_loss(loaded: Loaded, drawn: DrawnSpeech) -> LossOutput:
    """Returns the mean cross-entropy of each sample's labels, padding left out."""
    labels, model = drawn.labels.to(loaded.device), loaded.modules["model"]
    # Given labels, transformers shifts them, and computes a mean over the batch that is not wanted.
    ids, features = speech.shift(labels, model.config), drawn.features.to(loaded.device, model.dtype)
    output = model.model(input_features=features, decoder_input_ids=ids, use_cache=False)
    return LossOutput(cross_entropies(output.last_hidden_state, model.proj_out, labels))


def draw_chats(batch: Batch, rng: torch.Generator) -> DrawnChats:
    """Draws one view of the images of each sample."""
    name = "pixels" if "pixels" in batch.tensors else "features"
    views, num_tiles = batch.tensors[name], batch.tensors["num_tiles"]
    chosen = torch.randint(len(views), (len(batch),), generator=rng).tolist()
    of_samples = [int(counts.sum()) for counts in torch.split(num_tiles, batch.tensors["num_images"].tolist())]
    pieces = torch.split(views, of_samples, dim=1)
    images = torch.cat([piece[view] for piece, view in zip(pieces, chosen, strict=True)])
    size, ids, labels = (batch.tensors[counts] for counts in ("image_size", "input_ids", "labels"))
    return DrawnChats(images, name == "pixels", num_tiles.tolist(), size, ids, labels)


def chat_loss(loaded: Loaded, drawn: DrawnChats) -> LossOutput:
    """Returns the mean cross-entropy of the tokens of each sample's answers."""
    encoded = vision.encode(loaded, drawn.images) if drawn.is_pixels else drawn.images.to(loaded.device)
    features = list(torch.split(encoded, drawn.num_tiles))
    embedded = vision.embed(loaded, drawn.input_ids, features, drawn.image_size)
    # Padding is on the right, where causal attention never looks, so no mask is needed.
    output = loaded.parts["language_model"](inputs_embeds=embedded, use_cache=False)
    # The state at a token predicts the next one.
    states, head = output.last_hidden_state[:, :-1], loaded.modules["model"].lm_head
    per_sample = cross_entropies(states, head, drawn.labels[:, 1:])
    return LossOutput(per_sample if features else per_sample + vision.zero_with_gradient(loaded))


def cross_entropies(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy over the labels of each sample, [batch] float32.

    Args:
        hidden: [batch, tokens, width], the last states of the model.
        head: gives the logits; only of tokens with a label, which saves most of the memory.
        labels: [batch, tokens], what each state should predict, -100 where nothing is.
    """
    labels = labels.to(hidden.device)
    has_label = labels != IGNORED
    each = cross_entropy(head(hidden[has_label]).float(), labels[has_label], reduction="none")
    sums = each.new_zeros(len(labels)).index_add(0, has_label.nonzero()[:, 0], each)
    return sums / has_label.sum(dim=1)
