"""CLIP text encoding, shared by the Stable Diffusion families."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown

_PROMPTS_AT_ONCE = 32


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
    names = name_some([shown(prompt) for prompt in prompts])
    logger.warning("%d prompt(s) are longer than %d tokens and were cut: %s", len(prompts), limit, names)


def encode(tower: nn.Module, token_ids: Tensor, skip: int) -> Tensor:
    """Returns the hidden states of a layer after the final layer norm, [num_prompts, length, dim].

    Args:
        tower: CLIPTextModel.
        token_ids: [num_prompts, length].
        skip: which layer, counted from the end; 1 is the last.
    """
    if skip == 1:
        return tower(_moved(token_ids, tower)).last_hidden_state  # type: ignore[no-any-return]
    states = tower(_moved(token_ids, tower), output_hidden_states=True).hidden_states
    return getattr(tower, "text_model", tower).final_layer_norm(states[-skip])  # type: ignore[operator, no-any-return]


def encode_raw(tower: nn.Module, token_ids: Tensor, skip: int) -> tuple[Tensor, Tensor | None]:
    """Returns the hidden states of a layer without the final layer norm, and the projected summary of the prompt.

    Args:
        tower: CLIPTextModel, which has no summary, or CLIPTextModelWithProjection.
        token_ids: [num_prompts, length].
        skip: which layer, counted from the end.

    Returns:
        [num_prompts, length, dim] and [num_prompts, projection_dim].
    """
    output = tower(_moved(token_ids, tower), output_hidden_states=True)
    return output.hidden_states[-skip], getattr(output, "text_embeds", None)


@torch.no_grad()
def in_chunks(encode: Callable[[Tensor], Mapping[str, Tensor]], token_ids: Tensor) -> dict[str, Tensor]:
    """Encodes many prompts in batches; returns the columns of `encode`, float32 on the CPU."""
    chunks = [encode(rows) for rows in token_ids.split(_PROMPTS_AT_ONCE)]
    return {name: torch.cat([chunk[name] for chunk in chunks]).float().cpu() for name in chunks[0]}


def _moved(token_ids: Tensor, tower: nn.Module) -> Tensor:
    return token_ids.to(next(tower.parameters()).device)


@torch.no_grad()
def remembered(
    loaded: Loaded, prompts: Sequence[str], embed: Callable[[Sequence[str]], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Returns the embeddings of prompts, each [num_prompts, ...].

    As long as no adapter is there they are remembered in `loaded.text_cache`, so that the same prompts can still be
    used once the text encoders are released.

    Args:
        loaded: its `text_cache` is used.
        prompts: any number, with repeats.
        embed: prompts -> embeddings of each kind with one row for each prompt.
    """
    known = loaded.text_cache if loaded.adapters is None else dict(loaded.text_cache)
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if missing:
        assert "text_encoder" in loaded.parts, f"the text encoder was released before {missing[0]!r} was encoded"
        known.update(zip(missing, zip(*embed(missing), strict=True), strict=True))
    return tuple(torch.stack(kind) for kind in zip(*(known[prompt] for prompt in prompts), strict=True))
