"""Configs of the networks of a single-file checkpoint, read off the shapes and names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_diffusion.architectures.base import CLIP_VOCABULARY
from lora_diffusion.core.errors import ModelError
from lora_diffusion.families.stable_diffusion.components import Layout

Shapes = Mapping[str, tuple[int, ...]]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP_PREFIXES = {
    "sd1": {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": {},
    "sdxl": {"text_encoder": "conditioner.embedders.0.transformer.text_model."},
}
_OPEN_CLIP_PREFIXES = {
    "sd1": {},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {"text_encoder_2": "conditioner.embedders.1.model."},
}
_HEADS_SD1, _HEAD_WIDTH = 8, 64
_LAYERS_OF_SD2 = 23
"""Stable Diffusion 2 reads the output of the last layer but one, so diffusers leaves the last one away."""
_TIME_WIDTH_OF_SDXL = 256
_SAMPLE_SIZE = {"sd1": 64, "sd2": 64, "sdxl": 128}
_SAMPLE_SIZE_SD2_V = 96
_SCALING = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}


def component_configs(shapes: Shapes, metadata: Mapping[str, str], layout: Layout) -> dict[str, dict[str, Any]]:
    """Returns the config of each component that is there, as a diffusers folder would hold it.

    Args:
        shapes: name -> shape of every tensor.
        metadata: of the file; those of PREDICTION_KEYS are read.
        layout: family of the checkpoint.

    Raises:
        ModelError: it has another vocabulary than CLIP.
        LookupError: tensors are missing.
    """
    family = layout.family
    clip, open_clip = (
        {part: prefix for part, prefix in prefixes[family].items() if any(name.startswith(prefix) for name in shapes)}
        for prefixes in (_CLIP_PREFIXES, _OPEN_CLIP_PREFIXES)
    )
    towers = {part: _clip_config(shapes, prefix) for part, prefix in clip.items()}
    towers |= {part: _open_clip_config(shapes, prefix, family) for part, prefix in open_clip.items()}
    has_vae = any(name.startswith(_VAE) for name in shapes)
    scheduler = _scheduler_config(shapes, metadata, family)
    is_v2_768 = family == "sd2" and scheduler["prediction_type"] == "v_prediction"
    sample_size = _SAMPLE_SIZE_SD2_V if is_v2_768 else _SAMPLE_SIZE[family]
    return {
        "unet": _unet_config(shapes, family, sample_size, towers),
        **({"vae": _vae_config(shapes, family, sample_size)} if has_vae else {}),
        **{part: towers[part] for part in layout.towers if part in towers},
        "scheduler": scheduler,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns the number of distinct first groups among the names that a pattern matches from their start."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _unet_config(
    shapes: Shapes, family: str, sample_size: int, towers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Reads the UNet off its input blocks: residual layers of a level, then its downsampler."""
    blocks: list[list[int]] = [[]]
    for index in range(1, _count(shapes, re.escape(_UNET) + r"input_blocks\.(\d+)\.")):
        prefix = f"{_UNET}input_blocks.{index}."
        if f"{prefix}0.op.weight" in shapes:
            blocks.append([])
        else:
            blocks[-1].append(index)
    channels = [shapes[f"{_UNET}input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in blocks]
    depths = [
        _count(shapes, re.escape(f"{_UNET}input_blocks.{level[0]}.1.transformer_blocks.") + r"(\d+)\.")
        for level in blocks
    ]
    proj_in = next(name for name in shapes if name.startswith(_UNET) and name.endswith(".1.proj_in.weight"))
    to_k = next(name for name in shapes if name.startswith(_UNET) and name.endswith(".attn2.to_k.weight"))
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{_UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(blocks[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": shapes[to_k][1],
        "attention_head_dim": _HEADS_SD1 if family == "sd1" else [max(1, width // _HEAD_WIDTH) for width in channels],
        "use_linear_projection": len(shapes[proj_in]) == 2,
    }
    if family == "sdxl":
        width = shapes[f"{_UNET}label_emb.0.0.weight"][1]
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": width,
            # Six numbers, the sizes and the crop, beside the summary of the prompt; no weight depends on it.
            "addition_time_embed_dim": (width - towers["text_encoder_2"]["projection_dim"]) // 6
            if "text_encoder_2" in towers
            else _TIME_WIDTH_OF_SDXL,
        }
    return config


def _vae_config(shapes: Shapes, family: str, sample_size: int) -> dict[str, Any]:
    levels = _count(shapes, re.escape(_VAE) + r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size * 2 ** (levels - 1),
        "latent_channels": shapes[f"{_VAE}post_quant_conv.weight"][1],
        "block_out_channels": [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, re.escape(_VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": _SCALING[family],
        "force_upcast": family == "sdxl",
    }


def _clip_config(shapes: Shapes, prefix: str) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        **_tower_sizes(
            width=_vocabulary_width(shapes[f"{prefix}embeddings.token_embedding.weight"]),
            inner=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
            depth=_count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
            length=shapes[f"{prefix}embeddings.position_embedding.weight"][0],
        ),
        "hidden_act": "quick_gelu",
    }


def _open_clip_config(shapes: Shapes, prefix: str, family: str) -> dict[str, Any]:
    width = _vocabulary_width(shapes[f"{prefix}token_embedding.weight"])
    depth = _count(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    sizes = _tower_sizes(
        width=width,
        inner=shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0],
        depth=min(depth, _LAYERS_OF_SD2) if family == "sd2" else depth,
        length=shapes[f"{prefix}positional_embedding"][0],
    )
    kind = "CLIPTextModel" if family == "sd2" else "CLIPTextModelWithProjection"
    projection = shapes.get(f"{prefix}text_projection", (width, width))[1]
    return {"architectures": [kind], **sizes, "projection_dim": projection, "hidden_act": "gelu"}


def _vocabulary_width(shape: tuple[int, ...]) -> int:
    if shape[0] != CLIP_VOCABULARY:
        raise ModelError(
            f"The checkpoint's text encoder knows {shape[0]} tokens, CLIP has {CLIP_VOCABULARY}; convert the "
            "checkpoint to a diffusers folder that brings its own tokenizer."
        )
    return shape[1]


def _tower_sizes(width: int, inner: int, depth: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": CLIP_VOCABULARY,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "max_position_embeddings": length,
        "bos_token_id": CLIP_VOCABULARY - 2,
        "eos_token_id": CLIP_VOCABULARY - 1,
        "pad_token_id": 1,
    }


_SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler"},
}


PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
"""Metadata that tell what a base predicts; the second is ComfyUI's word."""


def _scheduler_config(shapes: Shapes, metadata: Mapping[str, str], family: str) -> dict[str, Any]:
    """Returns the family's scheduler, with what the file says of its training.

    Fine-tunes mark themselves with empty tensors `v_pred` and `ztsnr`, others in the metadata.
    """
    words = (metadata.get(key, "") for key in PREDICTION_KEYS)
    told = next(({"v": "v_prediction", "epsilon": "epsilon"}.get(word) for word in words if word), None)
    usual = "v_prediction" if family == "sd2" else "epsilon"
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": "v_prediction" if "v_pred" in shapes else told or usual,
    }
    if "ztsnr" in shapes:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**_SAMPLERS["sdxl" if family == "sdxl" else "sd2"], **common, **zero}
    return {**_SAMPLERS[family], **common}
