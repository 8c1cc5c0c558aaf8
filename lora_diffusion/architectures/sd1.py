"""Stable Diffusion 1.x: one CLIP text encoder, and a UNet that predicts the noise.

Source: config.json of stable-diffusion-v1-5; names are those of sd-scripts, A1111, Forge, ComfyUI and diffusers.
"""

from __future__ import annotations

from lora_diffusion.architectures.base import DiffusionArchitecture, TextEncoder, UNet

CLIP_L = ("ViT-L-14/openai", "ViT-L-14-quickgelu/openai", "openai/clip-vit-large-patch14")
COMFYUI_PREFIXES = frozenset(
    ("lora_unet_", "lora_unet_ ldm", "lycoris_", "unet.", "unet. processor", "bare", "processor", "diffusion_model.")
) | {"lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2."}
DIFFUSERS_PREFIXES = frozenset(("unet.", "unet. attention", "unet. processor", "text_encoder.", "text_encoder. short"))
TEXT_PREFIXES = frozenset(("lora_te_", "lora_te_ short", "lora_te1_", "lora_te1_ short"))
"""Names of the first text encoder that diffusers converts from kohya's."""

ARCHITECTURE = DiffusionArchitecture(
    name="sd1",
    title="Stable Diffusion 1.x",
    modelspec={"epsilon": "stable-diffusion-v1", "v_prediction": "stable-diffusion-v1"},
    implementation="diffusers",
    kohya_versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
    metadata_starts=("sd_v1", "sd_1", "stable-diffusion-v1"),
    name_marks=(
        r"lora_te_|text_encoder\.",
        r"(lora_unet_|unet\.)(up|down)_blocks[._]3|(in|out)put_blocks[._](9|10|11)[._]",
        r"^(text_model\.)?encoder\.layers\.\d+\.(self_attn|mlp)\.",
    ),
    unet=UNet(
        channels=(320, 640, 1280, 1280),
        depths=(1, 1, 1, 0),
        context=768,
        has_linear_projections=False,
        num_heads=8,
    ),
    text_encoders=(
        TextEncoder(
            part="text_encoder",
            num_layers=12,
            width=768,
            model_class="CLIPTextModel",
            kohya_prefixes=("lora_te_", "lora_te1_"),
            comfyui_name="clip_l",
            ldm_prefix="cond_stage_model.transformer.",
            clips=CLIP_L,
        ),
    ),
    resolutions={"epsilon": 512, "v_prediction": 512},
    latent_scaling=0.18215,
    scheduler={"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False},
    zero_snr_scheduler={"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    clip_skip_apps={"a1111": 1, "forge": 1, "kohya": 1},
    is_clip_skip_kohyas=True,
    ldm_mark="cond_stage_model.transformer.",
    app_title="Stable Diffusion 1",
    app_prefixes={
        "comfyui": COMFYUI_PREFIXES | {"text_encoders."},
        "forge": COMFYUI_PREFIXES,
        "a1111": frozenset(("lora_unet_", "lora_unet_ ldm", "lora_te_", "lora_te1_")),
        "kohya": frozenset(("lora_unet_", "lora_te_")),
        "diffusers": TEXT_PREFIXES | {"lora_unet_"},
        "diffusers dotted": DIFFUSERS_PREFIXES,
    },
)
