"""Networks of published bases on the meta device, which take no memory until they are filled with random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from lora_diffusion.architectures import DIFFUSION

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
    # openai/clip-vit-base-patch32, with the patches of LLaVA-1.5 and small images
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 112,
        "patch_size": 14,
    },
}


def unet_config(name: str) -> dict[str, Any]:
    """Returns the config.json of the UNet of a published Stable Diffusion: sd1, sd2 or sdxl."""
    return DIFFUSION[name].unet_config()


def text_encoder_configs(name: str) -> dict[str, dict[str, Any]]:
    """Returns part -> config.json of its text encoders."""
    return {encoder.part: encoder.config() for encoder in DIFFUSION[name].text_encoders}


def networks(name: str) -> dict[str, nn.Module]:
    """Returns new parts of a published Stable Diffusion on the meta device."""
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {"unet": diffusers.UNet2DConditionModel.from_config(unet_config(name))}
        for part, config in text_encoder_configs(name).items():
            model_class = getattr(transformers, config["architectures"][0])
            parts[part] = model_class(transformers.CLIPTextConfig(**config))
    return parts


@cache
def shared_networks(name: str) -> dict[str, nn.Module]:
    """Returns the same parts; shared, never changed."""
    return networks(name)


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


def whisper_config(name: str, **changes: Any) -> transformers.WhisperConfig:
    """Returns the config of openai/whisper-NAME."""
    width, layers, heads, bands, vocabulary = _WHISPERS[name]
    sizes = {"vocab_size": vocabulary, "num_mel_bins": bands, "d_model": width}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * width}
    return transformers.WhisperConfig(**sizes | changes)
