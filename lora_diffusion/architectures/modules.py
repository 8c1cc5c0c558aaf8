"""The modules of a diffusion base and the shapes of their weights: the one place that walks through its networks.

The walk goes through a network that is wider than the published one: every level may attend, with up to ten transformer
blocks, and text encoders have up to 32 layers, so that smaller and larger networks of the same build find their modules
too. Each layer says whether it is in the published one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from lora_diffusion.architectures.base import CLIP_LENGTH, CLIP_VOCABULARY, DiffusionArchitecture, TextEncoder, UNet
from lora_diffusion.core.adapter_state import ModuleKey

Shape = tuple[int, ...]
"""[out, in] of a linear layer, [out, in, k, k] of a convolution, [width] of a norm, [rows, width] of an embedding."""
_MOST_BLOCKS, _MOST_TEXT_LAYERS = 10, 32
_NO_ADAPTER = re.compile(r".*layer_norm\d?|.*embeddings\..*|conv_norm_out")
"""Paths of layers that programs train no adapter for."""


class Layer(NamedTuple):
    """A linear, convolution, norm or embedding layer."""

    path: str
    """As diffusers and transformers 5.6 call it."""
    shape: Shape
    """Of its weight."""
    is_published: bool = True
    """Whether the published network has it."""


@cache
def published_shapes(architecture: DiffusionArchitecture) -> Mapping[ModuleKey, Shape]:
    """Returns the shape of each weight of a published base that an adapter can change.

    Those are linear and convolution layers, and the norms of the UNet's blocks, which LyCORIS can train and ComfyUI
    finds.

    >>> from lora_diffusion.architectures import DIFFUSION
    >>> published_shapes(DIFFUSION["sd1"])[ModuleKey("unet", "mid_block.attentions.0.proj_in")]
    (1280, 1280, 1, 1)
    """
    return {
        ModuleKey(part, layer.path): layer.shape
        for part, layers in _layers(architecture).items()
        for layer in layers
        if layer.is_published and not _NO_ADAPTER.fullmatch(layer.path)
    }


def possible_paths(architecture: DiffusionArchitecture) -> dict[str, list[str]]:
    """Returns part -> paths of layers, norms and embeddings of any network of this build."""
    return {part: [layer.path for layer in layers] for part, layers in _layers(architecture).items()}


def decides_numbers(architecture: DiffusionArchitecture, path: str) -> bool:
    """Says whether a UNet path of `possible_paths` may count where modules are numbered as in LDM names.

    There the number of an upsampler depends on whether its block attends.
    """
    depths = architecture.unet.depths[::-1]
    match = re.match(r"up_blocks\.(\d+)\.attentions\.", path)
    return match is None or int(match[1]) == len(depths) - 1 or depths[int(match[1])] > 0


@cache
def _layers(architecture: DiffusionArchitecture) -> Mapping[str, tuple[Layer, ...]]:
    encoders = {encoder.part: tuple(_text_encoder(encoder)) for encoder in architecture.text_encoders}
    return {"unet": tuple(_unet(architecture.unet)), **encoders}


def _unet(unet: UNet) -> Iterator[Layer]:
    first, last, embedding = unet.channels[0], unet.channels[-1], 4 * unet.channels[0]
    yield Layer("conv_in", (first, unet.in_channels, 3, 3))
    yield Layer("conv_norm_out", (first,))
    yield Layer("conv_out", (unet.out_channels, first, 3, 3))
    yield from _two_layers("time_embedding.linear_", first, embedding)
    if unet.added:
        yield from _two_layers("add_embedding.linear_", unet.added, embedding)
    yield from _way_down(unet)
    yield from _residual("mid_block.resnets.0", last, last, embedding)
    yield from _attention("mid_block.attentions.0", last, max(unet.depths[-2:]), unet)
    yield from _residual("mid_block.resnets.1", last, last, embedding)
    yield from _way_up(unet)


def _two_layers(prefix: str, inner: int, outer: int) -> Iterator[Layer]:
    yield Layer(f"{prefix}1", (outer, inner))
    yield Layer(f"{prefix}2", (outer, outer))


def _way_down(unet: UNet) -> Iterator[Layer]:
    before = unet.channels[0]
    for level, (width, depth) in enumerate(zip(unet.channels, unet.depths, strict=True)):
        block = f"down_blocks.{level}"
        for layer in range(unet.num_layers):
            yield from _residual(f"{block}.resnets.{layer}", width if layer else before, width, 4 * unet.channels[0])
            yield from _attention(f"{block}.attentions.{layer}", width, depth, unet)
        yield Layer(f"{block}.downsamplers.0.conv", (width, width, 3, 3), level < len(unet.channels) - 1)
        before = width


def _way_up(unet: UNet) -> Iterator[Layer]:
    channels, depths = unet.channels[::-1], unet.depths[::-1]
    before = channels[0]
    for level, (width, depth) in enumerate(zip(channels, depths, strict=True)):
        block = f"up_blocks.{level}"
        below = channels[min(level + 1, len(channels) - 1)]
        for layer in range(unet.num_layers + 1):
            arriving = (width if layer else before) + (below if layer == unet.num_layers else width)
            yield from _residual(f"{block}.resnets.{layer}", arriving, width, 4 * unet.channels[0])
            yield from _attention(f"{block}.attentions.{layer}", width, depth, unet)
        yield Layer(f"{block}.upsamplers.0.conv", (width, width, 3, 3), level < len(channels) - 1)
        before = width


def _residual(block: str, inner: int, outer: int, embedding: int) -> Iterator[Layer]:
    yield Layer(f"{block}.norm1", (inner,))
    yield Layer(f"{block}.conv1", (outer, inner, 3, 3))
    yield Layer(f"{block}.time_emb_proj", (outer, embedding))
    yield Layer(f"{block}.norm2", (outer,))
    yield Layer(f"{block}.conv2", (outer, outer, 3, 3))
    yield Layer(f"{block}.conv_shortcut", (outer, inner, 1, 1), inner != outer)


def _attention(block: str, width: int, depth: int, unet: UNet) -> Iterator[Layer]:
    yield Layer(f"{block}.norm", (width,), depth > 0)
    for name in ("proj_in", "proj_out"):
        shape: Shape = (width, width) if unet.has_linear_projections else (width, width, 1, 1)
        yield Layer(f"{block}.{name}", shape, depth > 0)
    for number in range(max(depth, _MOST_BLOCKS)):
        for name, shape in _transformer_block(width, unet.context):
            yield Layer(f"{block}.transformer_blocks.{number}.{name}", shape, number < depth)


def _transformer_block(width: int, context: int) -> Iterator[tuple[str, Shape]]:
    for attention, source in (("attn1", width), ("attn2", context)):
        yield f"{attention}.to_q", (width, width)
        yield f"{attention}.to_k", (width, source)
        yield f"{attention}.to_v", (width, source)
        yield f"{attention}.to_out.0", (width, width)
    yield "ff.net.0.proj", (8 * width, width)
    yield "ff.net.2", (width, 4 * width)
    yield from ((f"norm{index}", (width,)) for index in (1, 2, 3))


def _text_encoder(encoder: TextEncoder) -> Iterator[Layer]:
    prefix, width = encoder.path_prefix, encoder.width
    for index in range(max(encoder.num_layers, _MOST_TEXT_LAYERS)):
        for name, shape in _text_layer(width):
            yield Layer(f"{prefix}encoder.layers.{index}.{name}", shape, index < encoder.num_layers)
    yield Layer(f"{prefix}embeddings.token_embedding", (CLIP_VOCABULARY, width))
    yield Layer(f"{prefix}embeddings.position_embedding", (CLIP_LENGTH, width))
    yield Layer(f"{prefix}final_layer_norm", (width,))
    if encoder.projection:
        yield Layer("text_projection", (encoder.projection, width))


def _text_layer(width: int) -> Iterator[tuple[str, Shape]]:
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield f"self_attn.{name}", (width, width)
    yield "mlp.fc1", (4 * width, width)
    yield "mlp.fc2", (width, 4 * width)
    yield "layer_norm1", (width,)
    yield "layer_norm2", (width,)
