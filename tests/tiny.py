"""A complete Stable Diffusion with random weights, small enough for unit tests: 16x16 pixels, latents 4x8x8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

_WORDS = ("a", "an", "the", "of", "red", "blue", "round", "cat", "dog", "heart", "face", "style", "picture", "sks")


def tiny_tokenizer() -> CLIPTokenizer:
    """Returns a CLIPTokenizer that knows every byte, and some words as one token."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in _WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = " ".join(parts[:2])
            if pair not in merges:
                merges.append(pair)
                vocab.append(parts[0] + parts[1])
            parts = [parts[0] + parts[1], *parts[2:]]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    numbered = {token: index for index, token in enumerate(vocab)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    return CLIPTokenizer(vocab=numbered, merges=pairs, model_max_length=16)


_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _tiny_unet(**settings: Any) -> UNet2DConditionModel:
    sizes: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 4}
    blocks = {"down_block_types": _DOWN, "up_block_types": _UP, "norm_num_groups": 8}
    return UNet2DConditionModel(**{"sample_size": 8, **sizes, **blocks, "cross_attention_dim": 32, **settings}).eval()


def _tiny_tower(kind: type[Any], tokenizer: CLIPTokenizer, **settings: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = {**sizes, "projection_dim": 32, "max_position_embeddings": 16, "vocab_size": len(tokenizer), **ids}
    return kind(CLIPTextConfig(**{**config, **settings})).eval()


def _tiny_vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        **settings,
    ).eval()


def _ddim(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type, **_SCHEDULE)


def tiny_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Returns a pipeline with fp32 weights that depend on the seed only; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, tokenizer = _tiny_unet(), tiny_tokenizer()
        text_encoder = _tiny_tower(CLIPTextModel, tokenizer)
        vae = _tiny_vae()
    return _one_tower(unet, vae, text_encoder, tokenizer, _ddim(prediction_type))


def tiny_sd2_pipeline(seed: int = 0, prediction_type: str = "v_prediction") -> StableDiffusionPipeline:
    """Returns the same for Stable Diffusion 2: exact GELU, linear projections, velocity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet, tokenizer = _tiny_unet(use_linear_projection=True, attention_head_dim=[2, 4]), tiny_tokenizer()
        text_encoder = _tiny_tower(CLIPTextModel, tokenizer, hidden_act="gelu")
        vae = _tiny_vae()
    return _one_tower(unet, vae, text_encoder, tokenizer, _ddim(prediction_type))


def tiny_sdxl_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """Returns the same for Stable Diffusion XL: two towers of different width, sizes, Euler's sampler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _tiny_unet(
            use_linear_projection=True,
            attention_head_dim=[2, 4],
            transformer_layers_per_block=[2, 1],
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 40,
        )
        tokenizer, second = tiny_tokenizer(), tiny_tokenizer()
        second.pad_token = "!"
        wide = {"hidden_size": 48, "projection_dim": 40, "hidden_act": "gelu", "num_hidden_layers": 3}
        pipeline = StableDiffusionXLPipeline(
            vae=_tiny_vae(force_upcast=True, scaling_factor=0.13025),
            text_encoder=_tiny_tower(CLIPTextModel, tokenizer),
            text_encoder_2=_tiny_tower(CLIPTextModelWithProjection, second, **wide),
            tokenizer=tokenizer,
            tokenizer_2=second,
            unet=unet,
            scheduler=EulerDiscreteScheduler(prediction_type=prediction_type, **_SCHEDULE),
            add_watermarker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _one_tower(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: Any, tokenizer: CLIPTokenizer, scheduler: Any
) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(path: Path, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Writes the pipeline as a diffusers folder and returns its path."""
    tiny_pipeline(seed, prediction_type).save_pretrained(path)
    return path


def save_tiny_sd2_pipeline(path: Path, seed: int = 0) -> Path:
    """Writes a Stable Diffusion 2."""
    tiny_sd2_pipeline(seed).save_pretrained(path)
    return path


def save_tiny_sdxl_pipeline(path: Path, seed: int = 0) -> Path:
    """Writes a Stable Diffusion XL."""
    tiny_sdxl_pipeline(seed).save_pretrained(path)
    return path
