"""What makes a file mean the same in every program that reads it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy

from lora_diffusion.algebra.delta import change_shape
from lora_diffusion.core.adapter_state import AdapterState, ModuleAdapter, ModuleKey

_ATTENTION = re.compile(r"(.*\.self_attn\.)([qkv]|out)_proj")
_MATRICES = ("q", "k", "v", "out")
_MLP = re.compile(r"(.*\.)mlp\.fc[12]")


def fit_dimensions(state: AdapterState, shapes: Mapping[ModuleKey, tuple[int, ...]]) -> AdapterState:
    """Gives lora factors as many dimensions as the base's weights have, two or four; no number changes.

    kohya and diffusers refuse factors of two dimensions on 1x1 convolutions, and of four on linear layers.

    Args:
        state: the adapter; tensors or arrays.
        shapes: those of the base's weights; modules that it lacks, or has in other sizes, stay as they are.
    """
    modules = {key: _fitted(adapter, shapes[key]) if key in shapes else adapter for key, adapter in state}
    return replace(state, modules=modules)


def _fitted(adapter: ModuleAdapter, weight: tuple[int, ...]) -> ModuleAdapter:
    if "down" not in adapter.tensors or "mid" in adapter.tensors:
        return adapter
    down, up = adapter.tensors["down"], adapter.tensors["up"]
    # ComfyUI writes the factors of convolutions flat.
    dims = weight[1:] if down.ndim == 2 and down.shape[1] == math.prod(weight[1:]) else down.shape[1:]
    if (up.shape[0], dims[0], *_plain(dims[1:])) != (*weight[:2], *_plain(weight[2:])):
        return adapter
    ones = (1,) * (len(weight) - 2)
    shapes = {"down": (down.shape[0], *weight[1:]), "up": (*up.shape[:2], *ones)}
    if "magnitude" in adapter.tensors:
        shapes["magnitude"] = (*adapter.tensors["magnitude"].shape[:2], *ones)
    tensors = {name: adapter.tensors[name].reshape(shape) for name, shape in shapes.items()}
    return replace(adapter, tensors={**adapter.tensors, **tensors})


def _plain(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return () if math.prod(kernel) == 1 else tuple(kernel)


def share_alpha(state: AdapterState) -> AdapterState:
    """Gives all lora modules of a part one alpha and scales `up` instead, so that every change stays what it was.

    diffusers applies the most common alpha of a file to all attention modules, whatever stands in theirs
    (`_get_alpha_name` and `get_peft_kwargs` of diffusers 0.42.1).
    """
    alphas = {
        part: Counter(adapter.alpha for key, adapter in state if key.part == part and adapter.variant == "lora")
        for part in state.parts()
    }
    modules: dict[ModuleKey, ModuleAdapter] = {}
    for key, adapter in state:
        if adapter.variant == "lora" and (shared := alphas[key.part].most_common(1)[0][0]) != adapter.alpha and shared:
            up = adapter.tensors["up"].float() * (adapter.alpha / shared)
            adapter = ModuleAdapter("lora", {**adapter.tensors, "up": up}, shared)  # noqa: PLW2901
        modules[key] = adapter
    return replace(state, modules=modules)


def complete_attention(state: AdapterState) -> AdapterState:
    """Adds lora zeros for those of q, k, v and out of a text encoder's layer that are missing where another is there.

    A1111 applies attention in OpenCLIP text encoders only where all four are there, of whatever variants, and diffusers
    refuses a text encoder without any out and without mlp. What is dora_out stays alone, since no reader of it mixes
    variants.
    """
    modules: dict[ModuleKey, ModuleAdapter] = {}
    for key, adapter in state:
        modules[key] = adapter
        match = _ATTENTION.fullmatch(key.path)
        if match and adapter.variant != "dora_out":
            for name in _MATRICES:
                other = ModuleKey(key.part, f"{match[1]}{name}_proj")
                if other not in state.modules and other not in modules:
                    modules[other] = _zeros_like(adapter)
    return replace(state, modules=modules)


def with_attention(state: AdapterState) -> AdapterState:
    """Adds lora zeros for the attention of one layer of each text encoder that has changes in mlp, but in no attention.

    diffusers tells the format of a text encoder by attention, where the names hold dots, and refuses it without any.

    Args:
        state: the adapter; tensors or arrays.
    """
    attending = {key.part for key in state.modules if _ATTENTION.fullmatch(key.path)}
    modules = dict(state.modules)
    for key, adapter in state:
        match = _MLP.fullmatch(key.path)
        if match and key.part not in attending and adapter.variant == "lora":
            attending.add(key.part)
            # Each matrix of an mlp has the width on one side, and more on the other.
            zeros = _square_zeros(adapter, min(change_shape(adapter)))
            modules |= {ModuleKey(key.part, f"{match[1]}self_attn.{name}_proj"): zeros for name in _MATRICES}
    return replace(state, modules=modules)


def _zeros_like(adapter: ModuleAdapter) -> ModuleAdapter:
    # All four are square matrices of one size.
    tensors = adapter.tensors
    if "blocks" in tensors:
        return _square_zeros(adapter, math.prod(tensors["blocks"].shape[-3:-1]))
    side = next((tensors[name].shape[-1] for name in ("factor", "bias") if name in tensors), None)
    return _square_zeros(adapter, side or change_shape(adapter)[0])


def _square_zeros(like: ModuleAdapter, width: int) -> ModuleAdapter:
    """Returns what changes nothing of a square matrix, in the dtype of another; one row is enough."""
    some: Any = next(iter(like.tensors.values()))
    zeros: Any = partial(numpy.zeros, dtype=some.dtype) if isinstance(some, numpy.ndarray) else some.new_zeros
    return ModuleAdapter("lora", {"down": zeros((1, width)), "up": zeros((width, 1))}, like.alpha)
