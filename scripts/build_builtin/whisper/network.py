"""The untrained model and its tokenizer, which spells every word by its letters."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from scripts.build_builtin.whisper.speech import CHUNK_S, make_extractor

LANGUAGE, TASK = "en", "transcribe"
MAX_TOKENS = 64
_END = "<|endoftext|>"
_SPECIAL = (
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
)


def make_tokenizer() -> WhisperTokenizer:
    """One token for each byte, then the special ones, then the timestamps."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, _END])}
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[], language=None, task=None, model_max_length=MAX_TOKENS, pad_token=_END
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL)})
    tokenizer.add_tokens([f"<|{index * 0.02:.2f}|>" for index in range(CHUNK_S * 50 + 1)])
    tokenizer.set_prefix_tokens(language=LANGUAGE, task=TASK, predict_timestamps=False)
    return tokenizer


def make_model(tokenizer: WhisperTokenizer) -> WhisperForConditionalGeneration:
    """Three layers that hear and two that write, 128 wide."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (_END, *_SPECIAL)}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=80,
        d_model=128,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        max_source_positions=CHUNK_S * 50,
        max_target_positions=MAX_TOKENS,
        pad_token_id=ids[_END],
        bos_token_id=ids[_END],
        eos_token_id=ids[_END],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=ids["<|startoftranscript|>"],
        pad_token_id=ids[_END],
        bos_token_id=ids[_END],
        eos_token_id=ids[_END],
        max_length=MAX_TOKENS,
        is_multilingual=True,
        lang_to_id={"<|en|>": ids["<|en|>"]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
    )
    return model


def save(model: WhisperForConditionalGeneration, tokenizer: WhisperTokenizer, folder: Path) -> None:
    """Write a folder that WhisperProcessor and WhisperForConditionalGeneration load."""
    model.save_pretrained(folder, safe_serialization=True)
    WhisperProcessor(make_extractor(), tokenizer).save_pretrained(folder)
