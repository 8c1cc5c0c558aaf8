"""Writes a diffusers pipeline as a single-file checkpoint with LDM names, after the public table of both spellings."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipeline: StableDiffusionPipeline, path: Path) -> Path:
    """Writes UNet, VAE and text encoder under the names of Stable Diffusion 1.x checkpoints."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in _vae(pipeline.vae).items()}
    prefix = "cond_stage_model.transformer.text_model."
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[prefix + name.removeprefix("text_model.")] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _rename(inner: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if inner.startswith(f"{old}."):
            return new + inner.removeprefix(old)
    return inner


def _unet(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    layers, out = unet.config.layers_per_block, {}
    for name, tensor in unet.state_dict().items():
        step = name.split(".")
        rest = ".".join(step[4:])
        if step[0] == "down_blocks":
            level, kind, j = int(step[1]), step[2], int(step[3])
            n = 1 + (layers + 1) * level + j
            if kind == "resnets":
                key = f"input_blocks.{n}.0.{_rename(rest, _RESNET)}"
            elif kind == "attentions":
                key = f"input_blocks.{n}.1.{rest}"
            else:
                key = f"input_blocks.{(layers + 1) * (level + 1)}.0.{rest.replace('conv.', 'op.')}"
        elif step[0] == "up_blocks":
            level, kind, j = int(step[1]), step[2], int(step[3])
            n = (layers + 1) * level + j
            if kind == "resnets":
                key = f"output_blocks.{n}.0.{_rename(rest, _RESNET)}"
            elif kind == "attentions":
                key = f"output_blocks.{n}.1.{rest}"
            else:
                n = (layers + 1) * level + layers
                has_attention = any(k.startswith(f"up_blocks.{level}.attentions.") for k in unet.state_dict())
                key = f"output_blocks.{n}.{2 if has_attention else 1}.{rest}"
        elif step[0] == "mid_block":
            inner = ".".join(step[3:])
            if step[1] == "attentions":
                key = f"middle_block.1.{inner}"
            else:
                key = f"middle_block.{2 * int(step[2])}.{_rename(inner, _RESNET)}"
        else:
            key = name.replace("time_embedding.linear_1", "time_embed.0").replace(
                "time_embedding.linear_2", "time_embed.2"
            )
            key = (
                key.replace("conv_in", "input_blocks.0.0")
                .replace("conv_norm_out", "out.0")
                .replace("conv_out", "out.2")
            )
        out[key] = tensor
    return out


def _vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels, out = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        key = name
        if ".down_blocks." in name:
            half, _, rest = name.partition(".down_blocks.")
            level, kind, j, inner = rest.split(".", 3)
            key = f"{half}.down.{level}." + (f"block.{j}.{inner}" if kind == "resnets" else f"downsample.{inner}")
        elif ".up_blocks." in name:
            half, _, rest = name.partition(".up_blocks.")
            level, kind, j, inner = rest.split(".", 3)
            key = f"{half}.up.{levels - 1 - int(level)}."
            key += f"block.{j}.{inner}" if kind == "resnets" else f"upsample.{inner}"
        elif ".mid_block.resnets." in name:
            half, _, rest = name.partition(".mid_block.resnets.")
            j, inner = rest.split(".", 1)
            key = f"{half}.mid.block_{int(j) + 1}.{inner}"
        elif ".mid_block.attentions.0." in name:
            half, _, inner = name.partition(".mid_block.attentions.0.")
            key = f"{half}.mid.attn_1.{_rename(inner, _VAE_ATTENTION)}"
        key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        is_convolution = ".attn_1." in key and tensor.dim() == 2
        out[key] = tensor[:, :, None, None] if is_convolution else tensor
    return out


def sd1_shaped_pipeline() -> StableDiffusionPipeline:
    """Returns a random Stable Diffusion 1.x with the real depth, names and vocabulary but narrow layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(32, 32, 64, 64), cross_attention_dim=64, attention_head_dim=8
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=1,
                max_position_embeddings=77,
            )
        )
    from diffusers import PNDMScheduler

    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=None,
        unet=unet.eval(),
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
