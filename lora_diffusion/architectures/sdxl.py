"""Stable Diffusion XL: two text encoders, pooled embeds of the prompt, and a UNet that is told sizes and crops.

Source: Podell et al. 2023, arXiv 2307.01952, sections 2.1 and 2.2; config.json of stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from lora_diffusion.architectures.base import DiffusionArchitecture, TextEncoder, UNet
from lora_diffusion.architectures.sd1 import CLIP_L, COMFYUI_PREFIXES, DIFFUSERS_PREFIXES, TEXT_PREFIXES

_KOHYA_UNET = frozenset(("lora_unet_", "lora_unet_ ldm"))

ARCHITECTURE = DiffusionArchitecture(
    name="sdxl",
    title="Stable Diffusion XL",
    modelspec={"epsilon": "stable-diffusion-xl-v1-base", "v_prediction": "stable-diffusion-xl-v1-base"},
    implementation="https://github.com/Stability-AI/generative-models",
    kohya_versions={"epsilon": "sdxl_base_v1-0", "v_prediction": "sdxl_base_v1-0"},
    metadata_starts=("sdxl", "stable-diffusion-xl"),
    name_marks=(
        r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.",
        r"attentions[._]\d[._]transformer_blocks[._][1-9]|_blocks_\d_1_transformer_blocks[._][1-9]|label_emb",
        r"add_embedding|lora_te1_",
    ),
    unet=UNet(
        channels=(320, 640, 1280),
        depths=(0, 2, 10),
        context=2048,
        has_linear_projections=True,
        added=2816,
        added_time=256,
    ),
    text_encoders=(
        TextEncoder(
            part="text_encoder",
            num_layers=12,
            width=768,
            model_class="CLIPTextModel",
            kohya_prefixes=("lora_te1_", "lora_te_"),
            comfyui_name="clip_l",
            ldm_prefix="conditioner.embedders.0.transformer.",
            clips=CLIP_L,
        ),
        TextEncoder(
            part="text_encoder_2",
            num_layers=32,
            width=1280,
            model_class="CLIPTextModelWithProjection",
            kohya_prefixes=("lora_te2_",),
            comfyui_name="clip_g",
            ldm_prefix="conditioner.embedders.1.model.",
            is_open_clip=True,
            path_prefix="text_model.",
            projection=1280,
            clips=("ViT-bigG-14/laion2b_s39b_b160k", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"),
        ),
    ),
    pipeline="StableDiffusionXLPipeline",
    unused_components=("feature_extractor", "image_encoder"),
    resolutions={"epsilon": 1024, "v_prediction": 1024},
    latent_scaling=0.13025,
    is_vae_upcast=True,
    scheduler={"_class_name": "EulerDiscreteScheduler"},
    zero_snr_scheduler={"_class_name": "EulerDiscreteScheduler"},
    has_zero_empty_prompt=True,
    has_final_norm=False,
    usual_clip_skip=2,
    clip_skip_apps={"forge": 2, "kohya": 1},
    has_ldm_names_in_kohya=True,
    ldm_mark="conditioner.embedders.1.",
    app_title="Stable Diffusion XL",
    version_start="sdxl_",
    app_prefixes={
        "comfyui": COMFYUI_PREFIXES | {"text_encoders."},
        "forge": COMFYUI_PREFIXES,
        "a1111": _KOHYA_UNET | {"lora_te1_", "lora_te2_"},
        "kohya": _KOHYA_UNET | {"lora_te1_", "lora_te2_"},
        "diffusers": _KOHYA_UNET | TEXT_PREFIXES | {"lora_te2_"},
        "diffusers dotted": DIFFUSERS_PREFIXES | {"text_encoder_2.", "text_encoder_2. projection"},
    },
    a1111_misnamed=r"up_blocks\.0\.upsamplers\.0\.conv",
)
