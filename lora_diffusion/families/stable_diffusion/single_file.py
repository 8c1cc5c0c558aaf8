"""Stable Diffusion checkpoints in one .safetensors file with LDM names.

Such a file holds weights only. The configs of its networks are read off the shapes, and the tokenizers are CLIP's own,
so nothing needs to be fetched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.architectures import clip_tokenizer, ldm_names
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ModelError, UntrainableError
from lora_diffusion.core.files import atomic_path, content_hash, default_cache_path, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.families.stable_diffusion import loading
from lora_diffusion.families.stable_diffusion.components import (
    LAYOUTS,
    Layout,
    as_loaded,
    build_skeleton,
    describe,
    load_dtypes,
    shared_skeleton,
)
from lora_diffusion.families.stable_diffusion.configs_from_shapes import PREDICTION_KEYS, Shapes, component_configs

if TYPE_CHECKING:
    import torch
    from torch import nn

_MARKS = {
    "conditioner.embedders.1.": "sdxl",
    "cond_stage_model.model.": "sd2",
    "cond_stage_model.transformer.": "sd1",
}
"""How the names of a family's text encoders begin."""
_MARKS_OF_OTHERS = {
    "conditioner.embedders.0.model.": "the refiner of Stable Diffusion XL, which no adapter can be trained for",
    "lora_unet_": "a LoRA adapter, not a base",
    "lora_te": "a LoRA adapter, not a base",
    "joint_blocks.": "Stable Diffusion 3",
    "double_blocks.": "FLUX",
    "conditioner.": "half of a Stable Diffusion XL",
    "model_ema.": "the averaged copies of the weights (EMA) alone",
}


@dataclass(frozen=True)
class SingleFile:
    """One checkpoint file."""

    path: Path
    layout: Layout

    def info(self, options: Any) -> BaseInfo:
        """Describes the base from the shapes of its tensors.

        Raises:
            UntrainableError: networks are missing, or the UNet takes more than latents.
        """
        lacking = [name for name in self.layout.networks if name not in self._configs]
        if lacking:
            raise UntrainableError(
                f"{self.path} is not a whole {self.layout.title} checkpoint: it holds no {', '.join(lacking)}.",
                self.path,
            )
        if _header(self.path).is_renamed:
            raise UntrainableError(
                f"{self.path} does not name its tensors as published {self.layout.title} checkpoints do, so that it "
                "cannot be loaded; adapters can be merged into it.",
                self.path,
            )
        try:
            info = describe(self._configs, self.layout, options)
        except UntrainableError as error:
            raise UntrainableError(str(error), self.path) from error
        info = replace(info, path=self.path, files=(self.path,), text_limit=clip_tokenizer.ClipTextLimit())
        if self.layout.family == "sd2" and options.prediction == "auto" and not _told_prediction(self.path):
            _warn_of_guess(str(self.path))
        return info

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds UNet and those text encoders that the file holds on the meta device."""
        return build_skeleton(self._configs, self.layout)

    def outline(self) -> Mapping[str, nn.Module]:
        """Returns UNet and text encoder on the meta device, to look at."""
        return shared_skeleton(self._configs, self.layout)

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the checkpoint through diffusers with configs made from its shapes."""
        import diffusers

        loading.silence_progress()
        info = self.info(options)
        dtypes = load_dtypes(options, self._configs, device)
        pipeline_type = getattr(diffusers, self.layout.pipeline)
        with loading.explained(self.path):
            pipeline = pipeline_type.from_single_file(
                str(self.path),
                config=str(self._config_folder()),
                local_files_only=True,
                dtype=dtypes["default"],
                **loading.unwanted(self.layout),
            )
            pipeline.vae.to(dtypes["vae"])
            return as_loaded(pipeline, self.layout, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes the whole file."""
        del components
        return f"{self.path.name}={content_hash(self.path)}"

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        shapes, metadata, _ = _header(self.path)
        _check_kind(self.path, shapes, self.layout)
        with loading.explained(self.path):
            return component_configs(shapes, metadata, self.layout)

    def _config_folder(self) -> Path:
        """Returns a pipeline folder without weights, made once for each set of shapes."""
        index = _index(self.layout, self._configs)
        text = json.dumps([self._configs, index], sort_keys=True)
        folder = default_cache_path() / "configs" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not folder.is_dir():
            with atomic_path(folder) as temporary:
                for name, config in self._configs.items():
                    file = "scheduler_config.json" if name == "scheduler" else "config.json"
                    write_json(temporary / name / file, config)
                write_json(temporary / "model_index.json", index)
                for tower, name in zip(self.layout.towers, self.layout.tokenizers, strict=True):
                    is_open_clip = self._configs[tower]["hidden_act"] == "gelu"
                    _write_tokenizer(temporary / name, "!" if is_open_clip else "<|endoftext|>")
        return folder


class _Header(NamedTuple):
    shapes: Shapes
    """By the names that published checkpoints use."""
    metadata: dict[str, str]
    is_renamed: bool
    """Whether the file uses other names."""


@cache
def _header(path: Path) -> _Header:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            published_name = ldm_names.published_name(file.keys())
            shapes = {published_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _Header(shapes, file.metadata() or {}, is_renamed=shapes.keys() != set(file.keys()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}); fetch it again.") from error


def _check_kind(path: Path, shapes: Shapes, layout: Layout) -> None:
    found = _family_of(shapes)
    if found not in (None, layout.family):
        raise ModelError(
            f"The base {path} is {LAYOUTS[found].title}, not {layout.title}; set model.family={found}, or give another "
            "model.path."
        )
    prefixes = {"unet": ldm_names.UNET, "vae": "first_stage_model."}
    missing = [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in shapes)]
    if found is None or "unet" in missing:
        missing += [] if found else list(layout.towers)
        kinds = [kind for mark, kind in _MARKS_OF_OTHERS.items() if any(name.startswith(mark) for name in shapes)]
        what = f"it looks like {kinds[0]}" if kinds else f"it holds no {', '.join(missing)}"
        raise ModelError(f"{path} is not a {layout.title} checkpoint: {what}.")


def _family_of(shapes: Shapes) -> str | None:
    """Returns the family that the names of text encoders tell, or without these the build of the UNet."""
    told = next((family for mark, family in _MARKS.items() if any(name.startswith(mark) for name in shapes)), None)
    projection = shapes.get(f"{ldm_names.UNET}middle_block.1.proj_in.weight")
    if told or not projection or any(name.startswith("conditioner.") for name in shapes):
        return told
    # SDXL has three levels and is told the sizes; the refiner and bases for image variations have four.
    has_sizes, is_deep = (
        f"{ldm_names.UNET}{name}.weight" in shapes for name in ("label_emb.0.0", "input_blocks.9.0.op")
    )
    if has_sizes:
        return None if is_deep else "sdxl"
    return "sd2" if len(projection) == 2 else "sd1"


def _told_prediction(path: Path) -> bool:
    shapes, metadata, _ = _header(path)
    return "v_pred" in shapes or any(key in metadata for key in PREDICTION_KEYS)


@cache
def _warn_of_guess(path: str) -> None:
    """Warns once in a process."""
    logger.warning(
        "%s does not say what its UNet predicts; v_prediction is assumed, as in Stable Diffusion 2.1 at 768 pixels. "
        "For a base of 512 pixels set model.prediction=epsilon.",
        path,
    )


def _index(layout: Layout, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "_class_name": layout.pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{tower: ["transformers", kind] for tower, kind in layout.towers.items()},
        **{name: ["transformers", "CLIPTokenizer"] for name in layout.tokenizers},
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        **{name: [None, None] for name in layout.unwanted},
        **({"force_zeros_for_empty_prompt": True} if layout.family == "sdxl" else {}),
    }


def _write_tokenizer(folder: Path, padding: str) -> None:
    """Writes CLIP's tokenizer files from the merge table that open_clip ships (Radford et al. 2021)."""
    from open_clip.tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = clip_tokenizer.merges()
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
            "pad_token": padding,
            "do_lower_case": True,
        },
    )
