"""The sizes of published bases, whose networks are made on the meta device: no memory until they are filled."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, WhisperConfig

_CROSS, _UP_CROSS = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
UNETS: dict[str, dict[str, Any]] = {
    # stable-diffusion-v1-5, unet/config.json: 859,520,964 parameters
    "sd1": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    # stable-diffusion-2-1, unet/config.json: 865,910,724 parameters
    "sd2": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    # stable-diffusion-xl-base-1.0, unet/config.json: 2,567,463,684 parameters
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", _CROSS, _CROSS],
        "up_block_types": [_UP_CROSS, _UP_CROSS, "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TOWERS: dict[str, dict[str, tuple[type[Any], dict[str, Any]]]] = {
    "sd1": {"text_encoder": (CLIPTextModel, _CLIP_L)},
    "sd2": {"text_encoder": (CLIPTextModel, _CLIP_H | {"hidden_act": "gelu"})},
    "sdxl": {
        "text_encoder": (CLIPTextModel, _CLIP_L),
        "text_encoder_2": (CLIPTextModelWithProjection, _CLIP_G | {"hidden_act": "gelu", "projection_dim": 1280}),
    },
}


_WHISPERS = {  # openai/whisper-*, config.json: width, layers, heads, mel bands, vocabulary
    "tiny": (384, 4, 6, 80, 51865),
    "base": (512, 6, 8, 80, 51865),
    "small": (768, 12, 12, 80, 51865),
    "medium": (1024, 24, 16, 80, 51865),
    "large-v3": (1280, 32, 20, 128, 51866),
}
LLAVA_1B: dict[str, dict[str, Any]] = {
    # TinyLlama/TinyLlama-1.1B-Chat-v1.0, with the vocabulary of LLaVA-1.5
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    # openai/clip-vit-base-patch32, with the patches of LLaVA-1.5 and small pictures
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 112,
        "patch_size": 14,
    },
}


def networks(family: str) -> dict[str, nn.Module]:
    """Returns new parts of a published Stable Diffusion on the meta device."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**UNETS[family])}
        for part, (kind, sizes) in TOWERS[family].items():
            parts[part] = kind(CLIPTextConfig(vocab_size=49408, **sizes))
    return parts


def fill(network: nn.Module, rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Gives a network of the meta device random weights on the generator's device, frozen; buffers hold anything.

    At no time is there a second copy of the weights.
    """
    network.to(dtype).to_empty(device=rng.device).requires_grad_(False).eval()
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=rng)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return network


@cache
def skeleton(family: str) -> dict[str, nn.Module]:
    """Returns the same parts; shared, never changed."""
    return networks(family)


def whisper_config(name: str, **changes: Any) -> WhisperConfig:
    """Returns the config of openai/whisper-NAME."""
    width, layers, heads, bands, vocabulary = _WHISPERS[name]
    sizes = {"vocab_size": vocabulary, "num_mel_bins": bands, "d_model": width}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * width}
    return WhisperConfig(**sizes | changes)
