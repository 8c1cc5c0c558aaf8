"""The `model:` keys of Whisper and LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.config.settings import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, fixed, free, one_of


@dataclass(frozen=True)
class WhisperOptions(ModelOptions):
    """A Whisper base, and what is asked of it."""

    family: str = "whisper"
    """Family of the base."""
    path: str = "builtin:digits"
    """builtin:digits, a folder of Whisper as save_pretrained makes it, or a hub id."""
    language: str = "en"
    """Code of the language that is spoken, for recordings whose table names none."""
    task: str = fixed("transcribe", one_of("transcribe", "translate"))
    """transcribe, or translate into English."""
    timestamps: bool = False
    """Keep timestamps such as <|0.00|> in transcripts and learn them; false drops them."""
    num_beams: int = free(1, AT_LEAST_ONE)
    """Transcripts that are followed at once in search of the likeliest; 5 is usual, 1 takes the likeliest token."""
    repetition_guard: bool = free(True)
    """Transcribe a recording again, with drawn tokens, where its transcript repeats itself, as Whisper's authors do."""
    mask_time_prob: float = fixed(0.0, SHARE)
    """SpecAugment: share of a recording's frames that are hidden in a training step; 0.05 is usual, 0 turns it off."""
    mask_time_length: int = fixed(10, AT_LEAST_ONE)
    """Frames of 10 ms in each hidden stretch."""
    mask_feature_prob: float = fixed(0.0, SHARE)
    """SpecAugment: share of the mel bands that are hidden in a training step."""
    mask_feature_length: int = fixed(10, AT_LEAST_ONE)
    """Mel bands in each hidden stripe."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "adapter.parts": ("encoder", "decoder"),
        "output.formats": ("peft",),
    }
    augmentation: ClassVar[Mapping[str, Any]] = {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}


@dataclass(frozen=True)
class LlavaOptions(ModelOptions):
    """A LLaVA base, 1.5 or NeXT, and how it answers."""

    family: str = "llava"
    """Family of the base."""
    path: str = "builtin:emoji-llava"
    """builtin:emoji-llava, a folder of LLaVA as save_pretrained makes it, or a hub id."""
    chat_template: str | None = None
    """File with a Jinja chat template; null takes that of the base."""
    max_new_tokens: int = free(64, AT_LEAST_ONE)
    """Longest answer in tokens."""
    temperature: float = free(0.0, NOT_NEGATIVE)
    """0 always takes the likeliest token; above, tokens are drawn, decided by the seed of the request."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "adapter.parts": ("language_model",),
        "adapter.targets": ("all-linear",),
        "output.formats": ("peft",),
    }
