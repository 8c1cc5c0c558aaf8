"""Writes a diffusers pipeline as a single-file checkpoint with LDM names, after the public table of both spellings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


_CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}


def save_single_file(
    pipeline: Any, path: Path, family: str = "sd1", marks: tuple[str, ...] = (), metadata: dict[str, str] | None = None
) -> Path:
    """Writes UNet, VAE and text encoders under the names of published checkpoints; marks become empty tensors."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in _unet(pipeline.unet).items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in _vae(pipeline.vae).items()}
    if family in _CLIP:
        for name, tensor in pipeline.text_encoder.state_dict().items():
            tensors[f"{_CLIP[family]}text_model.{name.removeprefix('text_model.')}"] = tensor
    if family in _OPEN_CLIP:
        tower = pipeline.text_encoder if family == "sd2" else pipeline.text_encoder_2
        tensors |= {_OPEN_CLIP[family] + name: t for name, t in _open_clip(tower, family).items()}
    tensors |= {mark: torch.zeros(0) for mark in marks}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def _open_clip(tower: Any, family: str) -> dict[str, Tensor]:
    """Joins q, k and v, and gives Stable Diffusion 2 the last layer that its pipeline leaves away."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in tower.state_dict().items()}
    depth, width = tower.config.num_hidden_layers, tower.config.hidden_size
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T if family == "sdxl" else torch.zeros(width, width),
        "logit_scale": torch.tensor(1.0),
    }
    for layer in range(depth):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for end in ("weight", "bias"):
            out[f"{new}attn.in_proj_{end}"] = torch.cat([state[f"{old}self_attn.{x}_proj.{end}"] for x in "qkv"])
            out[f"{new}attn.out_proj.{end}"] = state[f"{old}self_attn.out_proj.{end}"]
            out[f"{new}mlp.c_fc.{end}"] = state[f"{old}mlp.fc1.{end}"]
            out[f"{new}mlp.c_proj.{end}"] = state[f"{old}mlp.fc2.{end}"]
            out[f"{new}ln_1.{end}"] = state[f"{old}layer_norm1.{end}"]
            out[f"{new}ln_2.{end}"] = state[f"{old}layer_norm2.{end}"]
    if family == "sd2":
        last = f"transformer.resblocks.{depth - 1}."
        extra = {
            name.replace(last, f"transformer.resblocks.{depth}."): t.clone() for name, t in out.items() if last in name
        }
        out |= extra
    return out


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
            key = _rename(name, _OUTER)
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


def shaped_pipeline(family: str) -> Any:
    """Returns a random base with the real depth of the UNet, names and vocabulary, but narrow layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = (64, 128) if family == "sdxl" else (32, 32, 64, 64)
        vae = AutoencoderKL(
            block_out_channels=(32, 32, 64, 64),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size={"sd1": 512, "sd2": 768, "sdxl": 1024}[family],
        )
        if family == "sd1":
            unet = UNet2DConditionModel(
                sample_size=64, block_out_channels=wide, cross_attention_dim=64, attention_head_dim=8
            )
            return _one_tower(unet, vae, _tower(CLIPTextModel, num_hidden_layers=2))
        if family == "sd2":
            heads = [1, 1, 1, 1]
            unet = UNet2DConditionModel(
                sample_size=96,
                block_out_channels=wide,
                cross_attention_dim=64,
                attention_head_dim=heads,
                use_linear_projection=True,
            )
            return _one_tower(unet, vae, _tower(CLIPTextModel, num_hidden_layers=23, hidden_act="gelu"))
        return _sdxl(vae, wide)


def sd1_shaped_pipeline() -> StableDiffusionPipeline:
    """Returns that of Stable Diffusion 1."""
    return shaped_pipeline("sd1")  # type: ignore[no-any-return]


def _sdxl(vae: AutoencoderKL, wide: tuple[int, ...]) -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(32, *wide),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 3],
        attention_head_dim=[1, 1, 2],
        cross_attention_dim=64 + 128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + 128,
    )
    second = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 128, "hidden_act": "gelu"}
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=_tower(CLIPTextModel, num_hidden_layers=2),
        text_encoder_2=_tower(CLIPTextModelWithProjection, num_hidden_layers=3, **second),
        tokenizer=None,
        tokenizer_2=None,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


def _tower(kind: type[Any], **settings: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "max_position_embeddings": 77}
    return kind(CLIPTextConfig(**{"vocab_size": 49408, **sizes, **settings})).eval()


def _one_tower(unet: UNet2DConditionModel, vae: AutoencoderKL, tower: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=tower,
        tokenizer=None,
        unet=unet.eval(),
        scheduler=PNDMScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
