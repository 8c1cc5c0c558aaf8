"""The modules of the published Stable Diffusion bases, for work on files without any base.

A list is wider than the base it is named after, so that smaller and larger networks of the same build find their
modules too: every level may attend, with up to ten transformer blocks, and text towers have up to 32 layers.
"""

from __future__ import annotations

from collections.abc import Iterator

_MOST_BLOCKS, _MOST_TEXT_LAYERS = 10, 32
_TRANSFORMER = [
    *(f"attn{number}.to_{matrix}" for number in (1, 2) for matrix in ("q", "k", "v", "out.0")),
    *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
]
_TEXT = [
    *(f"self_attn.{matrix}_proj" for matrix in "qkv"),
    *("self_attn.out_proj", "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
]
_TEXT_ENDS = ("embeddings.token_embedding", "embeddings.position_embedding", "final_layer_norm")
_ENDS = ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")


def paths(family: str) -> dict[str, list[str]]:
    """Returns part -> paths of layers, norms and embeddings, as diffusers and transformers 5.6 call them."""
    text = {"text_encoder": _text()}
    if family == "sdxl":
        extra = ["add_embedding.linear_1", "add_embedding.linear_2"]
        second = [*(f"text_model.{path}" for path in _text()), "text_projection"]
        return {"unet": [*_unet(num_levels=3), *extra], **text, "text_encoder_2": second}
    return {"unet": _unet(num_levels=4), **text}


def is_published(family: str, path: str) -> bool:
    """Says whether a UNet path of the list may be in a published base, whose layout decides the numbers in LDM names.

    SD1 and SD2 do not attend in their first up block.
    """
    return family == "sdxl" or not path.startswith("up_blocks.0.attentions.")


def _unet(num_levels: int) -> list[str]:
    return [*_ENDS, *_down(num_levels), *_middle(), *_up(num_levels)]


def _down(num_levels: int) -> Iterator[str]:
    for level in range(num_levels):
        block = f"down_blocks.{level}"
        for layer in range(2):
            yield from _residual(f"{block}.resnets.{layer}")
            yield from _attention(f"{block}.attentions.{layer}")
        yield f"{block}.downsamplers.0.conv"


def _up(num_levels: int) -> Iterator[str]:
    for level in range(num_levels):
        block = f"up_blocks.{level}"
        for layer in range(3):
            yield from _residual(f"{block}.resnets.{layer}")
            yield from _attention(f"{block}.attentions.{layer}")
        yield f"{block}.upsamplers.0.conv"


def _middle() -> Iterator[str]:
    yield from _residual("mid_block.resnets.0")
    yield from _attention("mid_block.attentions.0")
    yield from _residual("mid_block.resnets.1")


def _residual(block: str) -> Iterator[str]:
    return (f"{block}.{name}" for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"))


def _attention(block: str) -> Iterator[str]:
    yield f"{block}.norm"
    yield f"{block}.proj_in"
    yield f"{block}.proj_out"
    for number in range(_MOST_BLOCKS):
        yield from (f"{block}.transformer_blocks.{number}.{name}" for name in _TRANSFORMER)


def _text() -> list[str]:
    layers = (f"encoder.layers.{layer}.{name}" for layer in range(_MOST_TEXT_LAYERS) for name in _TEXT)
    return [*layers, *_TEXT_ENDS]
