"""LLaVA: an image encoder, a projector, and a language model that answers questions about images."""

from __future__ import annotations

from lora_diffusion.architectures import llava
from lora_diffusion.core.base_model import Part
from lora_diffusion.families.language.options import LlavaOptions
from lora_diffusion.families.language.visual_question_answering import VisualQuestionAnswering

_PARTS = {
    "language_model": Part(
        groups={
            "attn": (r".*\.self_attn\.(q|k|v|o)_proj",),
            "ff": (r".*\.mlp\.(gate|up|down)_proj",),
            "all-linear": (r".*\.self_attn\.(q|k|v|o)_proj", r".*\.mlp\.(gate|up|down)_proj"),
        }
    ),
    "projector": Part(groups={"all-linear": (r"linear_\d",)}),
    "vision_tower": Part(
        groups={
            "attn": (r".*\.self_attn\.(q|k|v|out)_proj",),
            "ff": (r".*\.mlp\.fc[12]",),
            "all-linear": (r".*\.self_attn\.(q|k|v|out)_proj", r".*\.mlp\.fc[12]"),
        }
    ),
}

FAMILY = VisualQuestionAnswering(llava.ARCHITECTURE, LlavaOptions, _PARTS, {"emoji-llava": "emoji-llava"})
