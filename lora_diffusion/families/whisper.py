"""Whisper: an encoder of log-mel features, and a decoder that writes what is said."""

from __future__ import annotations

from lora_diffusion.architectures import whisper
from lora_diffusion.core.base_model import Part
from lora_diffusion.families.language.options import WhisperOptions
from lora_diffusion.families.language.speech_recognition import SpeechRecognition

_PROJECTIONS = r"(q|k|v|out)_proj"
_PARTS = {
    "encoder": Part(
        groups={
            "attn": (rf"layers\.\d+\.self_attn\.{_PROJECTIONS}",),
            "ff": (r"layers\.\d+\.fc[12]",),
            "all-linear": (rf"layers\.\d+\.(self_attn\.{_PROJECTIONS}|fc[12])",),
        }
    ),
    "decoder": Part(
        groups={
            "attn": (rf"layers\.\d+\.(self|encoder)_attn\.{_PROJECTIONS}",),
            "cross": (rf"layers\.\d+\.encoder_attn\.{_PROJECTIONS}",),
            "ff": (r"layers\.\d+\.fc[12]",),
            "all-linear": (rf"layers\.\d+\.((self|encoder)_attn\.{_PROJECTIONS}|fc[12])",),
        }
    ),
}

FAMILY = SpeechRecognition(whisper.ARCHITECTURE, WhisperOptions, _PARTS, {"digits": "digits-whisper"})
