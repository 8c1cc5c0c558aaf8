"""LLaVA 1.5 and NeXT: an image encoder, a projector, and a language model that answers questions about an image."""

from __future__ import annotations

from lora_diffusion.architectures.base import TextOutputArchitecture


def _paths(layers: str, num_layers: int, attention: tuple[str, ...], mlp: tuple[str, ...]) -> tuple[str, ...]:
    names = [*(f"self_attn.{name}" for name in attention), *(f"mlp.{name}" for name in mlp)]
    return tuple(f"{layers}.{index}.{name}" for index in range(num_layers) for name in names)


_LANGUAGE = _paths("layers", 80, ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
_VISION = _paths("encoder.layers", 48, ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"))

ARCHITECTURE = TextOutputArchitecture(
    name="llava",
    title="LLaVA as save_pretrained of transformers makes it",
    modelspec={"llava": "llava", "llava_next": "llava-next"},
    implementation="https://github.com/huggingface/transformers",
    name_marks=(r"(^|\.)(language_model|vision_tower|multi_modal_projector)\.",),
    model_classes={"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"},
    # Adapters of the days before transformers 4.52, and of the image encoder before 5.6, are read too.
    part_prefixes={
        "language_model": ("model.language_model.", "language_model.model."),
        "projector": ("model.multi_modal_projector.", "multi_modal_projector."),
        "vision_tower": (
            *("model.vision_tower.", "vision_tower.vision_model.", "model.vision_tower.vision_model."),
            "vision_tower.",
        ),
    },
    paths={
        "language_model": _LANGUAGE,
        "projector": ("linear_1", "linear_2"),
        "vision_tower": (*_VISION, "embeddings.patch_embedding"),
    },
    task="image-text-to-text",
    auto_class="AutoModelForImageTextToText",
)
