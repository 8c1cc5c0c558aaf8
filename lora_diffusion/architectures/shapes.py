"""Shapes of the weights that an adapter can change in the published Stable Diffusion 1, 2 and XL, without a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from lora_diffusion.core.adapter_state import ModuleKey

Shape = tuple[int, ...]
"""[out, in] of a linear layer, [out, in, k, k] of a convolution, [width] of a norm."""


@dataclass(frozen=True)
class _UNet:
    channels: tuple[int, ...]
    """By level."""
    depths: tuple[int, ...]
    """Transformer blocks of each attention, by level; the middle has those of the last level that attends."""
    context: int
    """Width of the text embedding."""
    is_linear: bool
    """proj_in and proj_out are linear layers, not 1x1 convolutions."""
    pooled: int = 0
    """Width of the added conditioning, 0 where there is none."""


@dataclass(frozen=True)
class _Text:
    num_layers: int
    width: int
    prefix: str = "encoder.layers."
    projection: int = 0


_UNETS = {
    "sd1": _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 768, is_linear=False),
    "sd2": _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, is_linear=True),
    "sdxl": _UNet((320, 640, 1280), (0, 2, 10), 2048, is_linear=True, pooled=2816),
}
_TEXTS = {
    "sd1": {"text_encoder": _Text(12, 768)},
    "sd2": {"text_encoder": _Text(23, 1024)},
    "sdxl": {
        "text_encoder": _Text(12, 768),
        "text_encoder_2": _Text(32, 1280, "text_model.encoder.layers.", projection=1280),
    },
}
PUBLISHED = tuple(_UNETS)
_LAYERS = 2
"""Residual blocks of a level on the way down; one more on the way up."""


@cache
def published(family: str) -> Mapping[ModuleKey, Shape]:
    """Returns the shape of each linear and convolution weight of sd1, sd2 or sdxl, paths as transformers 5.6 has them.

    Of the norm layers those of the UNet's blocks are there, which LyCORIS can train and ComfyUI finds.

    >>> published("sd1")[ModuleKey("unet", "mid_block.attentions.0.proj_in")]
    (1280, 1280, 1, 1)
    """
    shapes = {ModuleKey("unet", path): shape for path, shape in _unet(_UNETS[family])}
    for part, text in _TEXTS[family].items():
        shapes |= {ModuleKey(part, path): shape for path, shape in _text(text)}
    return shapes


def _unet(net: _UNet) -> Iterator[tuple[str, Shape]]:
    first, last, embedding = net.channels[0], net.channels[-1], 4 * net.channels[0]
    yield "conv_in", (first, 4, 3, 3)
    yield "conv_out", (4, first, 3, 3)
    yield from _pair("time_embedding.linear_", first, embedding)
    if net.pooled:
        yield from _pair("add_embedding.linear_", net.pooled, embedding)
    yield from _way_down(net)
    yield from _residual("mid_block.resnets.0", last, last, embedding)
    yield from _attention("mid_block.attentions.0", last, max(net.depths[-2:]), net)
    yield from _residual("mid_block.resnets.1", last, last, embedding)
    yield from _way_up(net)


def _pair(prefix: str, inner: int, outer: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}1", (outer, inner)
    yield f"{prefix}2", (outer, outer)


def _way_down(net: _UNet) -> Iterator[tuple[str, Shape]]:
    before = net.channels[0]
    for level, (own, depth) in enumerate(zip(net.channels, net.depths, strict=True)):
        block = f"down_blocks.{level}"
        for layer in range(_LAYERS):
            yield from _residual(f"{block}.resnets.{layer}", own if layer else before, own, 4 * net.channels[0])
            yield from _attention(f"{block}.attentions.{layer}", own, depth, net)
        if level < len(net.channels) - 1:
            yield f"{block}.downsamplers.0.conv", (own, own, 3, 3)
        before = own


def _way_up(net: _UNet) -> Iterator[tuple[str, Shape]]:
    channels, depths = net.channels[::-1], net.depths[::-1]
    before = channels[0]
    for level, (own, depth) in enumerate(zip(channels, depths, strict=True)):
        block = f"up_blocks.{level}"
        below = channels[min(level + 1, len(channels) - 1)]
        for layer in range(_LAYERS + 1):
            arriving = (own if layer else before) + (below if layer == _LAYERS else own)
            yield from _residual(f"{block}.resnets.{layer}", arriving, own, 4 * net.channels[0])
            yield from _attention(f"{block}.attentions.{layer}", own, depth, net)
        if level < len(channels) - 1:
            yield f"{block}.upsamplers.0.conv", (own, own, 3, 3)
        before = own


def _residual(block: str, inner: int, outer: int, embedding: int) -> Iterator[tuple[str, Shape]]:
    yield f"{block}.norm1", (inner,)
    yield f"{block}.norm2", (outer,)
    yield f"{block}.conv1", (outer, inner, 3, 3)
    yield f"{block}.time_emb_proj", (outer, embedding)
    yield f"{block}.conv2", (outer, outer, 3, 3)
    if inner != outer:
        yield f"{block}.conv_shortcut", (outer, inner, 1, 1)


def _attention(block: str, width: int, depth: int, net: _UNet) -> Iterator[tuple[str, Shape]]:
    if not depth:
        return
    yield f"{block}.norm", (width,)
    for name in ("proj_in", "proj_out"):
        yield f"{block}.{name}", (width, width) if net.is_linear else (width, width, 1, 1)
    for number in range(depth):
        own = f"{block}.transformer_blocks.{number}"
        yield from ((f"{own}.norm{index}", (width,)) for index in (1, 2, 3))
        for attention, source in (("attn1", width), ("attn2", net.context)):
            yield f"{own}.{attention}.to_q", (width, width)
            yield f"{own}.{attention}.to_k", (width, source)
            yield f"{own}.{attention}.to_v", (width, source)
            yield f"{own}.{attention}.to_out.0", (width, width)
        yield f"{own}.ff.net.0.proj", (8 * width, width)
        yield f"{own}.ff.net.2", (width, 4 * width)


def _text(text: _Text) -> Iterator[tuple[str, Shape]]:
    width = text.width
    for layer in range(text.num_layers):
        own = f"{text.prefix}{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{own}.self_attn.{name}", (width, width)
        yield f"{own}.mlp.fc1", (4 * width, width)
        yield f"{own}.mlp.fc2", (width, 4 * width)
    if text.projection:
        yield "text_projection", (text.projection, width)
