"""CLIP text encoding: from prompts to the columns of prepared items, and to what a UNet takes besides latents.

A text encoder has one column, which holds its embeddings [captions, length, dim], or token ids [captions, length] if it
is trained. Where the UNet takes pooled embeds, their column [captions, dim] is there unless their encoder is trained,
and another is 0 for an empty caption that the base knows as zeros, else 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.architectures.base import DiffusionArchitecture, TextEncoder
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import ImageText, Request
from lora_diffusion.core.text import name_some, shown

_PROMPTS_AT_ONCE = 32
_POOLED, _IS_SHOWN, _TIME_IDS = "summary", "shown", "time_ids"
"""Columns as caches hold them."""
_ENDINGS = ("", "_empty", "_prior", "_anchor", "_base")
"""Of the text columns."""

Condition = Mapping[str, Tensor]
"""What a UNet takes besides latents and timesteps, all in its dtype and on its device: "context"
[batch, length, dim], and where it is told of sizes "text_embeds" [batch, dim] and "time_ids" [batch, 6]."""
Rows = Mapping[str, Tensor]
"""Name of a text column or view tensor -> a row of it for each sample, [batch, ...]."""


def describe(
    loaded: Loaded, architecture: DiffusionArchitecture, prompts: Sequence[str], trained: frozenset[str]
) -> dict[str, Tensor]:
    """Returns the columns of the text encoders, with one row for each prompt, on the CPU: [prompts, ...]."""
    columns: dict[str, Tensor] = {}
    for encoder in architecture.text_encoders:
        ids = tokenize(loaded.modules[encoder.tokenizer], prompts)
        if encoder.part in trained:
            columns[encoder.column] = ids
        else:
            columns |= _in_chunks(partial(_read, loaded, architecture, encoder), ids)
    return columns


def sizes_and_visibility(
    loaded: Loaded, architecture: DiffusionArchitecture, sample: ImageText, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Returns what a UNet that is told of sizes needs besides: the sizes of views, and which captions are shown to it.

    Args:
        loaded: knows whether an empty caption is zeros.
        architecture: of the base.
        sample: with its sizes.
        tensors: of its prepared item: "moments" [views, ...], and text columns [captions, ...].

    Returns:
        "time_ids" [views, 6] if there are views; a column [captions] for each ending if there are texts.
    """
    if not architecture.unet.added:
        return {}
    views = {_TIME_IDS: _sizes(sample)[: len(tensors["moments"])]} if "moments" in tensors else {}
    first = architecture.text_encoders[0].column
    lengths = {ending: len(tensors[first + ending]) for ending in _ENDINGS if first + ending in tensors}
    is_shown = {f"{_IS_SHOWN}{ending}": torch.ones(length) for ending, length in lengths.items()}
    if is_shown and loaded.modules["zero_empty_prompt"]:
        is_shown[f"{_IS_SHOWN}_empty"] = torch.zeros(1)
    return {**views, **is_shown}


def _sizes(sample: ImageText) -> Tensor:
    """Returns original size, crop and size of the image and of its mirror image, [2, 6]."""
    width, height = sample.original_size
    left, top, right, _ = sample.crop
    # What was cut off at the right is at the left of the mirror image.
    rows = [[height, width, top, offset, sample.size[1], sample.size[0]] for offset in (left, right)]
    return torch.tensor(rows, dtype=torch.float32)


def encode_rows(loaded: Loaded, architecture: DiffusionArchitecture, rows: Rows) -> Condition:
    """Returns what the UNet takes for rows [batch, ...] of columns; token ids are encoded, with gradient."""
    columns = dict(rows)
    for encoder in architecture.text_encoders:
        if not rows[encoder.column].is_floating_point():
            columns |= _read(loaded, architecture, encoder, rows[encoder.column])
    dtype: Any = loaded.parts["unet"].dtype
    hidden = [columns[encoder.column].to(loaded.device, dtype) for encoder in architecture.text_encoders]
    if not architecture.unet.added:
        return {"context": torch.cat(hidden, dim=-1)}
    is_shown = columns[_IS_SHOWN].to(loaded.device, dtype)[:, None]
    return {
        "context": torch.cat(hidden, dim=-1) * is_shown[:, None],
        "text_embeds": columns[_POOLED].to(loaded.device, dtype) * is_shown,
        "time_ids": columns[_TIME_IDS].to(loaded.device, dtype),
    }


def encode_requests(
    loaded: Loaded, architecture: DiffusionArchitecture, requests: Sequence[Request], size: tuple[int, int]
) -> tuple[Condition, Condition]:
    """Returns the conditions of prompts and of negative prompts, [requests, ...], for whole images of this size."""
    names = [encoder.column for encoder in architecture.text_encoders]
    names += [_POOLED] if architecture.unet.added else []

    def embed(prompts: Sequence[str]) -> tuple[Tensor, ...]:
        columns: dict[str, Tensor] = {}
        for encoder in architecture.text_encoders:
            columns |= _read(loaded, architecture, encoder, tokenize(loaded.modules[encoder.tokenizer], prompts))
        return tuple(columns[name] for name in names)

    def condition(prompts: list[str], is_shown: list[bool]) -> Condition:
        rows = dict(zip(names, _remembered(loaded, prompts, embed), strict=True))
        times = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]]).repeat(len(prompts), 1)
        return encode_rows(loaded, architecture, {**rows, _IS_SHOWN: torch.tensor(is_shown), _TIME_IDS: times})

    negatives = [request.negative for request in requests]
    has_negative = [bool(negative) or not loaded.modules["zero_empty_prompt"] for negative in negatives]
    positive = condition([request.prompt for request in requests], [True] * len(requests))
    return positive, condition(negatives, has_negative)


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Returns token ids padded to the tokenizer's length, [num_prompts, length] int64.

    A prompt that is longer is cut, and one warning names those that were.
    """
    full = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = [prompt for prompt, ids in zip(prompts, full, strict=True) if len(ids) > tokenizer.model_max_length]
    if cut:
        _warn_of_cut(tuple(dict.fromkeys(cut)), tokenizer.model_max_length - 2)
    ids: Tensor = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


@cache
def _warn_of_cut(prompts: tuple[str, ...], limit: int) -> None:
    """Warns of prompts once in a process."""
    names = name_some([shown(prompt) for prompt in prompts])
    logger.warning("%d prompt(s) are longer than %d tokens and were cut: %s", len(prompts), limit, names)


def _read(
    loaded: Loaded, architecture: DiffusionArchitecture, encoder: TextEncoder, token_ids: Tensor
) -> dict[str, Tensor]:
    """Returns the columns of a text encoder for token ids [prompts, length], with gradient."""
    skip = loaded.options.clip_skip or architecture.usual_clip_skip
    network = loaded.parts[encoder.part]
    if architecture.has_final_norm:
        return {encoder.column: _normed_states(network, token_ids, skip)}
    hidden, pooled = _raw_states(network, token_ids, skip)
    return {encoder.column: hidden} if pooled is None else {encoder.column: hidden, _POOLED: pooled}


def _normed_states(network: nn.Module, token_ids: Tensor, skip: int) -> Tensor:
    """Returns the hidden states of a layer after the final layer norm, [num_prompts, length, dim]."""
    states: Tensor
    if skip == 1:
        states = network(_moved(token_ids, network)).last_hidden_state
        return states
    outputs = network(_moved(token_ids, network), output_hidden_states=True).hidden_states
    text_model: Any = getattr(network, "text_model", network)
    states = text_model.final_layer_norm(outputs[-skip])
    return states


def _raw_states(network: nn.Module, token_ids: Tensor, skip: int) -> tuple[Tensor, Tensor | None]:
    """Returns the hidden states of a layer without the final layer norm, and the pooled embeds of the prompt, if any.

    Returns:
        [num_prompts, length, dim] and [num_prompts, projection_dim].
    """
    output = network(_moved(token_ids, network), output_hidden_states=True)
    return output.hidden_states[-skip], getattr(output, "text_embeds", None)


@torch.no_grad()
def _in_chunks(encode: Callable[[Tensor], Mapping[str, Tensor]], token_ids: Tensor) -> dict[str, Tensor]:
    """Encodes many prompts in batches; returns the columns of `encode`, float32 on the CPU."""
    chunks = [encode(rows) for rows in torch.split(token_ids, _PROMPTS_AT_ONCE)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).float().cpu() for name in chunks[0]}


def _moved(token_ids: Tensor, network: nn.Module) -> Tensor:
    return token_ids.to(next(network.parameters()).device)


@torch.no_grad()
def _remembered(
    loaded: Loaded, prompts: Sequence[str], embed: Callable[[Sequence[str]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Returns the embeddings of prompts, each [num_prompts, ...].

    As long as no adapter is there they are remembered in `loaded.text_cache`, so that the same prompts can still be
    used once the text encoders are released.

    Args:
        loaded: its `text_cache` is used.
        prompts: any number, with repeats.
        embed: prompts -> its embeddings, one tensor for each column with one row for each prompt.
    """
    known = loaded.text_cache if loaded.adapters is None else dict(loaded.text_cache)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if missing:
        assert "text_encoder" in loaded.parts, f"the text encoder was released before {missing[0]!r} was encoded"
        known.update(zip(missing, zip(*embed(missing), strict=True), strict=True))
    return tuple(torch.stack(column) for column in zip(*(known[prompt] for prompt in prompts), strict=True))
