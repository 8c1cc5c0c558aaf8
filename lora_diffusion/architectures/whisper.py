"""Whisper: an encoder of log-mel features, and a decoder that writes what is said."""

from __future__ import annotations

from lora_diffusion.architectures.base import TextOutputArchitecture

_NUM_LAYERS = 32
"""Of encoder and decoder of the largest."""
_ATTENTION = tuple(f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
_CROSS = tuple(name.replace("self_attn", "encoder_attn") for name in _ATTENTION)


def _paths(*names: str) -> tuple[str, ...]:
    return tuple(f"layers.{index}.{name}" for index in range(_NUM_LAYERS) for name in names)


ARCHITECTURE = TextOutputArchitecture(
    name="whisper",
    title="Whisper as save_pretrained of transformers makes it",
    modelspec={"whisper": "whisper"},
    implementation="https://github.com/huggingface/transformers",
    name_marks=(r"^model\.(en|de)coder\.layers\.|\.encoder_attn\.",),
    model_classes={"whisper": "WhisperForConditionalGeneration"},
    part_prefixes={"encoder": ("model.encoder.",), "decoder": ("model.decoder.",)},
    paths={"encoder": _paths(*_ATTENTION, "fc1", "fc2"), "decoder": _paths(*_ATTENTION, *_CROSS, "fc1", "fc2")},
    task="automatic-speech-recognition",
    auto_class="AutoModelForSpeechSeq2Seq",
)
