"""Stable Diffusion 2.x: as 1.x, with OpenCLIP's text encoder and, at 768 pixels, a UNet that predicts the velocity.

The text encoder of a diffusers folder has 23 of OpenCLIP's 24 layers, so its last layer is the penultimate one, which
the UNet was trained with.

Source: config.json of stable-diffusion-2-1.
"""

from __future__ import annotations

from dataclasses import replace

from lora_diffusion.architectures import sd1
from lora_diffusion.architectures.base import TextEncoder

ARCHITECTURE = replace(
    sd1.ARCHITECTURE,
    name="sd2",
    title="Stable Diffusion 2.x",
    modelspec={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    kohya_versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
    is_v2=True,
    metadata_starts=("sd_v2", "sd_2", "stable-diffusion-v2"),
    name_marks=(r"text_encoders\.clip_h\.",),
    unet=replace(sd1.ARCHITECTURE.unet, context=1024, has_linear_projections=True, num_heads=None),
    text_encoders=(
        TextEncoder(
            part="text_encoder",
            num_layers=23,
            width=1024,
            model_class="CLIPTextModel",
            kohya_prefixes=("lora_te_", "lora_te1_"),
            comfyui_name="clip_h",
            ldm_prefix="cond_stage_model.model.",
            is_open_clip=True,
            num_dropped_layers=1,
            clips=("ViT-H-14/laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        ),
    ),
    resolutions={"epsilon": 512, "v_prediction": 768},
    usual_prediction="v_prediction",
    scheduler=sd1.ARCHITECTURE.zero_snr_scheduler,
    clip_skip_apps={"forge": 1},
    is_clip_skip_kohyas=False,
    ldm_mark="cond_stage_model.model.",
    app_title="Stable Diffusion 2",
    app_prefixes={
        **sd1.ARCHITECTURE.app_prefixes,
        "a1111": frozenset(("lora_unet_", "lora_unet_ ldm", "lora_te_")),
    },
)
