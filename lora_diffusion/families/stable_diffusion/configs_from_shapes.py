"""Configs of the networks of a single-file checkpoint, read off the shapes and names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_diffusion.architectures.base import CLIP_VOCABULARY, DiffusionArchitecture, TextEncoder
from lora_diffusion.core.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."


def component_configs(
    shapes: Shapes, metadata: Mapping[str, str], architecture: DiffusionArchitecture
) -> dict[str, dict[str, Any]]:
    """Returns the config of each component that is there, as a diffusers folder would hold it.

    Args:
        shapes: name -> shape of every tensor.
        metadata: of the file; those of PREDICTION_KEYS are read.
        architecture: of the checkpoint.

    Raises:
        ModelError: it has another vocabulary than CLIP.
        LookupError: tensors are missing.
    """
    texts = {
        encoder.part: (_open_clip_config if encoder.is_open_clip else _clip_config)(shapes, encoder)
        for encoder in architecture.text_encoders
        if any(name.startswith(_prefix(encoder)) for name in shapes)
    }
    has_vae = any(name.startswith(_VAE) for name in shapes)
    scheduler = _scheduler_config(shapes, metadata, architecture)
    sample_size = architecture.sample_size(scheduler["prediction_type"])
    return {
        "unet": _unet_config(shapes, architecture, sample_size, texts),
        **({"vae": _vae_config(shapes, architecture, sample_size)} if has_vae else {}),
        **texts,
        "scheduler": scheduler,
    }


def _prefix(encoder: TextEncoder) -> str:
    return encoder.ldm_prefix if encoder.is_open_clip else f"{encoder.ldm_prefix}text_model."


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns the number of distinct first groups among the names that a pattern matches from their start."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _unet_config(
    shapes: Shapes, architecture: DiffusionArchitecture, sample_size: int, texts: Mapping[str, Mapping[str, Any]]
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
    net = replace(
        architecture.unet,
        channels=tuple(channels),
        depths=tuple(depths),
        context=shapes[to_k][1],
        has_linear_projections=len(shapes[proj_in]) == 2,
        in_channels=shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        out_channels=shapes[f"{_UNET}out.2.weight"][0],
        num_layers=len(blocks[0]),
    )
    if net.added:
        width = shapes[f"{_UNET}label_emb.0.0.weight"][1]
        pooled = texts.get(architecture.text_encoders[-1].part)
        # Six numbers, the sizes and the crop, beside the pooled embeds; no weight depends on it.
        time = (width - pooled["projection_dim"]) // 6 if pooled else net.added_time
        net = replace(net, added=width, added_time=time)
    return net.config(sample_size)


def _vae_config(shapes: Shapes, architecture: DiffusionArchitecture, sample_size: int) -> dict[str, Any]:
    levels = _count(shapes, re.escape(_VAE) + r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": sample_size * 2 ** (levels - 1),
        "latent_channels": shapes[f"{_VAE}post_quant_conv.weight"][1],
        "block_out_channels": [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, re.escape(_VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": architecture.latent_scaling,
        "force_upcast": architecture.is_vae_upcast,
    }


def _clip_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    prefix = _prefix(encoder)
    sized = replace(
        encoder,
        width=_vocabulary_width(shapes[f"{prefix}embeddings.token_embedding.weight"]),
        num_layers=_count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
    )
    inner = shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0]
    return sized.config(inner, shapes[f"{prefix}embeddings.position_embedding.weight"][0])


def _open_clip_config(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    prefix = _prefix(encoder)
    width = _vocabulary_width(shapes[f"{prefix}token_embedding.weight"])
    depth = _count(shapes, re.escape(prefix) + r"transformer\.resblocks\.(\d+)\.")
    sized = replace(
        encoder,
        width=width,
        num_layers=min(depth, encoder.num_layers) if encoder.num_dropped_layers else depth,
        projection=shapes.get(f"{prefix}text_projection", (width, width))[1],
    )
    inner = shapes[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"][0]
    return sized.config(inner, shapes[f"{prefix}positional_embedding"][0])


def _vocabulary_width(shape: tuple[int, ...]) -> int:
    if shape[0] != CLIP_VOCABULARY:
        raise ModelError(
            f"The checkpoint's text encoder knows {shape[0]} tokens, CLIP has {CLIP_VOCABULARY}; convert the "
            "checkpoint to a diffusers folder that brings its own tokenizer."
        )
    return shape[1]


PREDICTION_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")
"""Metadata that tell what a base predicts; the second is ComfyUI's word."""


def _scheduler_config(
    shapes: Shapes, metadata: Mapping[str, str], architecture: DiffusionArchitecture
) -> dict[str, Any]:
    """Returns the architecture's scheduler, with what the file says of its training.

    Fine-tunes mark themselves with empty tensors `v_pred` and `ztsnr`, others in the metadata.
    """
    words = (metadata.get(key, "") for key in PREDICTION_KEYS)
    stated = next(({"v": "v_prediction", "epsilon": "epsilon"}.get(word) for word in words if word), None)
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": "v_prediction" if "v_pred" in shapes else stated or architecture.usual_prediction,
    }
    if "ztsnr" in shapes:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return {**architecture.zero_snr_scheduler, **common, **zero}
    return {**architecture.scheduler, **common}
