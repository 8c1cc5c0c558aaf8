"""A complete Whisper with random weights, small enough for unit tests: it hears one second and spells by letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
from tokenizers import pre_tokenizers
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from scripts.benchmarks.published_networks import whisper_config

RATE = 16000
_END = "<|endoftext|>"
_SPECIAL = ("<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>")


def tiny_whisper_tokenizer(*, without: tuple[str, ...] = ()) -> WhisperTokenizer:
    """Returns a tokenizer with one token for each byte, and the special ones but for those left out."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, _END])}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], model_max_length=48, pad_token=_END)
    tokenizer.add_special_tokens({"additional_special_tokens": [name for name in _SPECIAL if name not in without]})
    tokenizer.add_tokens([f"<|{index * 0.02:.2f}|>" for index in range(51)])
    return tokenizer


def tiny_whisper(tokenizer: WhisperTokenizer, seed: int = 0) -> WhisperForConditionalGeneration:
    """Returns a model whose weights depend on the seed only; large ones, so that what it hears matters."""
    start, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|startoftranscript|>", _END))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WhisperForConditionalGeneration(
            WhisperConfig(
                vocab_size=len(tokenizer),
                num_mel_bins=16,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=50,
                max_target_positions=48,
                init_std=0.25,
                pad_token_id=end,
                bos_token_id=end,
                eos_token_id=end,
                decoder_start_token_id=start,
                suppress_tokens=None,
                begin_suppress_tokens=None,
            )
        )
    model.generation_config.is_multilingual = True
    return model.eval()


def save_tiny_whisper(path: Path, seed: int = 0, *, without: tuple[str, ...] = ()) -> Path:
    """Writes model, tokenizer and feature extractor as a folder and returns its path."""
    tokenizer = tiny_whisper_tokenizer(without=without)
    tiny_whisper(tokenizer, seed).save_pretrained(path)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16, chunk_length=1), tokenizer).save_pretrained(path)
    return path


def chirp(seconds: float = 0.5, pitch: float = 200.0, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """Returns a rising tone, [num_samples] or [num_samples, channels]."""
    times = np.arange(round(seconds * rate)) / rate
    sound = 0.3 * np.sin(2 * np.pi * pitch * times * (1 + times / (2 * max(seconds, 1e-6)))).astype(np.float32)
    return sound if channels == 1 else np.stack([sound] * channels, axis=1)


def write_recording(path: Path, text: str | None = None, **kwargs: float) -> Path:
    """Writes a tone and, if given, the transcript beside it."""
    rate = int(kwargs.get("rate", RATE))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, chirp(**kwargs), rate)  # type: ignore[arg-type]
    if text is not None:
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


_NUM_WEIGHTS = {
    "tiny": 37_760_640,
    "base": 72_593_920,
    "small": 241_734_912,
    "medium": 763_857_920,
    "large-v3": 1_543_490_560,
}
"""Of openai/whisper-*, by which we know that the shapes are right."""


def published_parts(name: str) -> dict[str, torch.nn.Module]:
    """Returns encoder and decoder of a published size on the meta device."""
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper_config(name))
    assert sum(parameter.numel() for parameter in model.model.parameters()) == _NUM_WEIGHTS[name]
    return {"encoder": model.model.encoder, "decoder": model.model.decoder}
