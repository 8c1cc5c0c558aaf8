"""Stable Diffusion 1.x checkpoints in one .safetensors file with LDM names.

Such a file holds weights only. The configs of its networks are read off the shapes, and the tokenizer is CLIP's own, so
nothing needs to be fetched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import atomic_path, default_cache_path, write_json
from lora_diffusion.core.types import BaseInfo, Loaded
from lora_diffusion.families import _sources

if TYPE_CHECKING:
    import torch
    from torch import nn

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."
_PREFIXES = {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT, "tokenizer": _TEXT}
_MARKS_OF_OTHERS = {
    "conditioner.embedders.": "Stable Diffusion XL",
    "cond_stage_model.model.": "Stable Diffusion 2",
    "lora_unet_": "a LoRA adapter, not a base",
    "lora_te": "a LoRA adapter, not a base",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
}
_CLIP_VOCABULARY = 49408
_HEADS_UNET, _HEAD_WIDTH_TEXT = 8, 64

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SingleFile:
    """One checkpoint file."""

    path: Path

    def info(self, options: Any) -> BaseInfo:
        """Describes the base from the shapes of its tensors."""
        return _sources.describe(self._configs, options.path, options.prediction)

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds UNet and text encoder on the meta device."""
        return _sources.build_skeleton(self._configs)

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the checkpoint through diffusers with configs made from its shapes."""
        from diffusers import StableDiffusionPipeline

        from lora_diffusion.core.device import frozen_dtype

        _sources.silence_progress()
        info = self.info(options)
        pipeline = StableDiffusionPipeline.from_single_file(
            str(self.path),
            config=str(self._config_folder()),
            local_files_only=True,
            dtype=frozen_dtype(options.dtype, device),
            safety_checker=None,
        )
        return _sources.as_loaded(pipeline, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes the whole file."""
        del components
        return f"{self.path.name}={_sources.content_hash(self.path)}"

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        shapes = _shapes(self.path)
        return {
            "unet": _unet_config(shapes),
            "vae": _vae_config(shapes),
            "text_encoder": _text_config(shapes),
            "scheduler": _SCHEDULER,
        }

    def _config_folder(self) -> Path:
        """Returns a pipeline folder without weights, made once for each set of shapes."""
        text = json.dumps(self._configs, sort_keys=True)
        folder = default_cache_path() / "configs" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not folder.is_dir():
            with atomic_path(folder) as temporary:
                for name, config in self._configs.items():
                    file = "scheduler_config.json" if name == "scheduler" else "config.json"
                    write_json(temporary / name / file, config)
                write_json(temporary / "model_index.json", _INDEX)
                _write_tokenizer(temporary / "tokenizer")
        return folder


@cache
def _shapes(path: Path) -> Shapes:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}); fetch it again.") from error
    missing = [part for part, prefix in _PREFIXES.items() if not any(name.startswith(prefix) for name in shapes)]
    if missing:
        kinds = [kind for mark, kind in _MARKS_OF_OTHERS.items() if any(name.startswith(mark) for name in shapes)]
        what = f"it looks like {kinds[0]}" if kinds else f"it holds no {', '.join(dict.fromkeys(missing))}"
        raise ModelError(f"{path} is not a Stable Diffusion 1.x checkpoint: {what}.")
    return shapes


def _count(shapes: Shapes, pattern: str) -> int:
    """Returns the number of distinct first groups among the names that a pattern matches from their start."""
    return len({match[1] for name in shapes if (match := re.match(pattern, name))})


def _unet_config(shapes: Shapes) -> dict[str, Any]:
    """Reads the UNet off its input blocks: residual layers of a level, then its downsampler."""
    blocks: list[list[int]] = [[]]
    for index in range(1, _count(shapes, re.escape(_UNET) + r"input_blocks\.(\d+)\.")):
        prefix = f"{_UNET}input_blocks.{index}."
        if f"{prefix}0.op.weight" in shapes:
            blocks.append([])
        else:
            blocks[-1].append(index)
    channels = [shapes[f"{_UNET}input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in blocks]
    attends = [f"{_UNET}input_blocks.{level[0]}.1.proj_in.weight" in shapes for level in blocks]
    proj_in = next(name for name in shapes if name.startswith(_UNET) and name.endswith(".1.proj_in.weight"))
    to_k = next(name for name in shapes if name.startswith(_UNET) and name.endswith(".attn2.to_k.weight"))
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "in_channels": shapes[f"{_UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{_UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": len(blocks[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        "cross_attention_dim": shapes[to_k][1],
        "attention_head_dim": _HEADS_UNET,
        "use_linear_projection": len(shapes[proj_in]) == 2,
    }


def _vae_config(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, re.escape(_VAE) + r"encoder\.down\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 512,
        "latent_channels": shapes[f"{_VAE}post_quant_conv.weight"][1],
        "block_out_channels": [shapes[f"{_VAE}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(shapes, re.escape(_VAE) + r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.18215,
    }


def _text_config(shapes: Shapes) -> dict[str, Any]:
    num_tokens, width = shapes[f"{_TEXT}embeddings.token_embedding.weight"]
    if num_tokens != _CLIP_VOCABULARY:
        raise ModelError(
            f"The checkpoint's text encoder knows {num_tokens} tokens, CLIP has {_CLIP_VOCABULARY}; convert the "
            "checkpoint to a diffusers folder that brings its own tokenizer."
        )
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": num_tokens,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": shapes[f"{_TEXT}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, re.escape(_TEXT) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, width // _HEAD_WIDTH_TEXT),
        "max_position_embeddings": shapes[f"{_TEXT}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu",
        "bos_token_id": _CLIP_VOCABULARY - 2,
        "eos_token_id": _CLIP_VOCABULARY - 1,
        "pad_token_id": 1,
    }


_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def _write_tokenizer(folder: Path) -> None:
    """Writes CLIP's tokenizer files from the merge table that open_clip ships (Radford et al. 2021)."""
    import open_clip
    from open_clip.tokenizer import bytes_to_unicode

    table = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    lines = gzip.decompress(table.read_bytes()).decode("utf-8").split("\n")
    letters = list(bytes_to_unicode().values())
    merges = lines[1 : _CLIP_VOCABULARY - 2 * len(letters) - 2 + 1]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "do_lower_case": True,
        },
    )
