"""A complete LLaVA with random weights, small enough for unit tests: four patches of a picture, words of letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from lora_diffusion.families.language.vision import parts_of

SIDE, PATCH = 16, 8
START, END, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
TEMPLATE_WITHOUT_END = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""What llava-hf/llava-1.5-7b-hf says: no end token after an answer."""
TEMPLATE = TEMPLATE_WITHOUT_END.replace(
    "{{ content['text'] + ' '}}", "{{ content['text'] + (eos_token if message['role'] == 'assistant' else ' ') }}"
)


def tiny_llava_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token for each byte, and the special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": START, "eos_token": END, "pad_token": PAD, "additional_special_tokens": [IMAGE]}
    backend.add_special_tokens([START, END, PAD, IMAGE])
    backend.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, backend.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    # Large weights, so that what is seen matters.
    vision = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=32, initializer_factor=4.0)
    text = LlamaConfig(**sizes, vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.25, **ids)
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "initializer_range": 0.25,
        **ids,
    }


def save_tiny_llava(path: Path, seed: int = 0, *, template: str | None = TEMPLATE) -> Path:
    """Writes a LLaVA-1.5 with its processor as a folder and returns its path; weights depend on the seed only."""
    tokenizer = tiny_llava_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(LlavaConfig(**_settings(tokenizer))).save_pretrained(path)
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=side, crop_size=side)
    _processor(LlavaProcessor, images, tokenizer, template).save_pretrained(path)
    return path


def save_tiny_llava_next(path: Path, seed: int = 0, *, template: str | None = TEMPLATE) -> Path:
    """Writes a LLaVA-NeXT, which also looks at the two halves of a long picture."""
    tokenizer = tiny_llava_tokenizer()
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlavaNextConfig(**_settings(tokenizer), image_grid_pinpoints=grids)
        LlavaNextForConditionalGeneration(config).save_pretrained(path)
    side = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=side, image_grid_pinpoints=grids)
    _processor(LlavaNextProcessor, images, tokenizer, template).save_pretrained(path)
    return path


def _processor(kind: Any, images: Any, tokenizer: PreTrainedTokenizerFast, template: str | None) -> Any:
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return kind(images, tokenizer, **settings, chat_template=template)


def write_picture(path: Path, seed: int = 0, size: tuple[int, int] = (20, 20)) -> Path:
    """Writes a picture of coloured squares that depends on the seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def entry(image: str, *texts: str) -> dict[str, Any]:
    """Returns a conversation in LLaVA's layout; questions and answers in turn, the picture before the first."""
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": image, "image": image, "conversations": turns}


def write_chats(folder: Path, entries: Sequence[Any], name: str = "chats.json") -> Path:
    """Writes conversations as one JSON file and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(list(entries)), encoding="utf-8")
    return folder / name


_NUM_WEIGHTS_7B = 7_063_427_072
"""Of llava-hf/llava-1.5-7b-hf, by which we know that the shape below is right."""


def published_llava_config() -> LlavaConfig:
    """Returns the config of LLaVA-1.5 with 7 billion weights."""
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(**text, vocab_size=32064),
        image_token_index=32000,
    )


def published_llava_parts() -> dict[str, torch.nn.Module]:
    """Returns the parts of LLaVA-1.5 with 7 billion weights on the meta device."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(published_llava_config())
    assert sum(parameter.numel() for parameter in model.parameters()) == _NUM_WEIGHTS_7B
    return parts_of(model)
