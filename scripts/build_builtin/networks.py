"""Shapes of the four networks; the numbers that decide size and speed are all here."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from open_clip.model import CLIP
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.build_builtin.tokenizer import CONTEXT_LENGTH

PIXELS = 64
TEXT_WIDTH = 160
UNET_CHANNELS = (48, 96, 160)


def read_tokenizer(work: Path) -> CLIPTokenizer:
    """Tokenizer of stage 2."""
    return CLIPTokenizer.from_pretrained(work / "tokenizer")


def clip_config(width: int, embed_dim: int, vocabulary: int) -> dict[str, Any]:
    """open_clip model configuration of the CLIPs trained here; `width` is the image tower's."""
    return {
        "embed_dim": embed_dim,
        "vision_cfg": {"image_size": PIXELS, "layers": [1, 1, 1, 1], "width": width, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": TEXT_WIDTH,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "tokenizer",
        },
    }


def make_clip(config: dict[str, Any]) -> CLIP:
    """Untrained open_clip model."""
    return CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Untrained text encoder of the generator."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_vae() -> AutoencoderKL:
    """Untrained autoencoder, 64 pixels to 4 latents at 16x16."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=4,
        sample_size=PIXELS,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def make_unet(channels: tuple[int, ...] = UNET_CHANNELS) -> UNet2DConditionModel:
    """Untrained denoiser."""
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # diffusers reads this as the number of heads; 32 wide each
        attention_head_dim=tuple(max(1, width // 32) for width in channels),
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Noise schedule of Stable Diffusion with v-prediction."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def count_parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def write_open_clip_config(path: Path, config: dict[str, Any]) -> None:
    """open_clip_config.json with the preprocessing these towers were trained with."""
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1) + "\n", encoding="utf-8")
