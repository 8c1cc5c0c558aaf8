"""CLIP text encoding, shared by the Stable Diffusion families."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.core.types import Loaded


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Returns token ids padded to the tokenizer's length, [num_prompts, length] int64.

    A prompt that is longer is cut, and one warning names those that were.
    """
    full = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
    cut = [prompt for prompt, ids in zip(prompts, full, strict=True) if len(ids) > tokenizer.model_max_length]
    if cut:
        _warn_of_cut(tuple(dict.fromkeys(cut)), tokenizer.model_max_length - 2)
    return tokenizer(  # type: ignore[no-any-return]
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


@cache
def _warn_of_cut(prompts: tuple[str, ...], limit: int) -> None:
    """Warns of prompts once in a process."""
    logger.warning(
        "%d prompt(s) are longer than %d tokens and were cut: %s", len(prompts), limit, name_some([*prompts])
    )


def encode(text_encoder: nn.Module, token_ids: Tensor) -> Tensor:
    """Returns the last hidden states after the final layer norm, [num_prompts, length, dim]."""
    device = next(text_encoder.parameters()).device
    return text_encoder(token_ids.to(device))[0]  # type: ignore[no-any-return]


@torch.no_grad()
def encode_prompts(loaded: Loaded, prompts: Sequence[str]) -> Tensor:
    """Returns the embeddings of prompts, [num_prompts, length, dim].

    As long as no adapter is there they are remembered in `loaded.text_cache`, so that the same prompts can still be
    used once the text encoder is released.
    """
    known, encoder = loaded.text_cache, loaded.parts.get("text_encoder")
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    fresh: dict[str, Tensor] = {}
    if missing:
        assert encoder is not None, f"the text encoder was released before {missing[0]!r} was encoded"
        fresh = dict(zip(missing, encode(encoder, tokenize(loaded.modules["tokenizer"], missing)), strict=True))
    if loaded.adapters is None:
        known.update(fresh)
    return torch.stack([fresh[prompt] if prompt in fresh else known[prompt] for prompt in prompts])
