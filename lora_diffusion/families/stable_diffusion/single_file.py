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

from lora_diffusion.architectures import DIFFUSION, clip_tokenizer, ldm_names
from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ModelError, UntrainableError
from lora_diffusion.core.files import atomic_path, content_hash, default_cache_path, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.families.model_files import explained, silence_progress
from lora_diffusion.families.stable_diffusion.components import (
    as_loaded,
    describe,
    load_dtypes,
    meta_modules,
    other_family,
    shared_meta_modules,
)
from lora_diffusion.families.stable_diffusion.configs_from_shapes import PREDICTION_KEYS, Shapes, component_configs

if TYPE_CHECKING:
    import torch
    from torch import nn

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
    architecture: DiffusionArchitecture

    def info(self, options: Any) -> BaseInfo:
        """Describes the base from the shapes of its tensors.

        Raises:
            UntrainableError: networks are missing, or the UNet takes more than latents.
        """
        lacking = [name for name in self.architecture.networks if name not in self._configs]
        if lacking:
            raise UntrainableError(
                f"{self.path} is not a whole {self.architecture.title} checkpoint: it holds no {', '.join(lacking)}.",
                self.path,
            )
        if _header(self.path).is_renamed:
            raise UntrainableError(
                f"{self.path} does not name its tensors as published {self.architecture.title} checkpoints do, so that "
                "it cannot be loaded; adapters can be merged into it.",
                self.path,
            )
        try:
            info = describe(self._configs, self.architecture, options)
        except UntrainableError as error:
            raise UntrainableError(str(error), self.path) from error
        info = replace(info, path=self.path, files=(self.path,), text_limit=clip_tokenizer.ClipTextLimit())
        if (
            self.architecture.is_distinguished_by_prediction
            and options.prediction == "auto"
            and not _says_prediction(self.path)
        ):
            _warn_of_guess(str(self.path))
        return info

    def meta_modules(self) -> dict[str, nn.Module]:
        """Builds UNet and those text encoders that the file holds on the meta device."""
        return meta_modules(self._configs, self.architecture)

    def shared_meta_modules(self) -> Mapping[str, nn.Module]:
        """Returns UNet and text encoder on the meta device, to look at."""
        return shared_meta_modules(self._configs, self.architecture)

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the checkpoint through diffusers with configs made from its shapes."""
        import diffusers

        silence_progress()
        info = self.info(options)
        dtypes = load_dtypes(options, self._configs, self.architecture, device)
        pipeline_type = getattr(diffusers, self.architecture.pipeline)
        with explained(self.path):
            pipeline = pipeline_type.from_single_file(
                str(self.path),
                config=str(self._config_folder()),
                local_files_only=True,
                dtype=dtypes["default"],
                **dict.fromkeys(self.architecture.unused_components),
            )
            pipeline.vae.to(dtypes["vae"])
            return as_loaded(pipeline, self.architecture, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes the whole file."""
        del components
        return f"{self.path.name}={content_hash(self.path)}"

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        shapes, metadata, _ = _header(self.path)
        _check_family(self.path, shapes, self.architecture)
        with explained(self.path):
            return component_configs(shapes, metadata, self.architecture)

    def _config_folder(self) -> Path:
        """Returns a pipeline folder without weights, made once for each set of shapes."""
        index = _index(self.architecture, self._configs)
        text = json.dumps([self._configs, index], sort_keys=True)
        folder = default_cache_path() / "configs" / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not folder.is_dir():
            with atomic_path(folder) as temporary:
                for name, config in self._configs.items():
                    file = "scheduler_config.json" if name == "scheduler" else "config.json"
                    write_json(temporary / name / file, config)
                write_json(temporary / "model_index.json", index)
                for encoder in self.architecture.text_encoders:
                    _write_tokenizer(temporary / encoder.tokenizer, "!" if encoder.is_open_clip else "<|endoftext|>")
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
            checkpoint_name = ldm_names.checkpoint_name(file.keys())
            shapes = {checkpoint_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _Header(shapes, file.metadata() or {}, is_renamed=shapes.keys() != set(file.keys()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}); fetch it again.") from error


def _check_family(path: Path, shapes: Shapes, architecture: DiffusionArchitecture) -> None:
    actual = _found(shapes, architecture)
    if actual is not None and actual is not architecture:
        raise other_family(architecture, actual, str(path))
    prefixes = {"unet": ldm_names.UNET, "vae": "first_stage_model."}
    missing = [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in shapes)]
    if actual is None or "unet" in missing:
        missing += [] if actual else [encoder.part for encoder in architecture.text_encoders]
        others = [title for mark, title in _MARKS_OF_OTHERS.items() if any(name.startswith(mark) for name in shapes)]
        what = f"it looks like {others[0]}" if others else f"it holds no {', '.join(missing)}"
        raise ModelError(f"{path} is not a {architecture.title} checkpoint: {what}.")


def _found(shapes: Shapes, wanted: DiffusionArchitecture) -> DiffusionArchitecture | None:
    """Returns what the names of text encoders tell, or without these the build of the UNet; `wanted` if it may be so.

    Marks are compared from the last architecture to the first, since a later one may hold what an earlier one has.
    """
    candidates = (wanted, *reversed(list(DIFFUSION.values())))
    marks = [candidate for candidate in candidates if any(name.startswith(candidate.ldm_mark) for name in shapes)]
    projection = shapes.get(f"{ldm_names.UNET}middle_block.1.proj_in.weight")
    if marks or not projection or any(name.startswith("conditioner.") for name in shapes):
        return marks[0] if marks else None
    # The refiner of Stable Diffusion XL and bases for image variations have one level more.
    has_sizes, is_deep = (
        f"{ldm_names.UNET}{name}.weight" in shapes for name in ("label_emb.0.0", "input_blocks.9.0.op")
    )
    if has_sizes and is_deep:
        return None
    is_linear = len(projection) == 2
    return next(
        candidate
        for candidate in candidates
        if bool(candidate.unet.added) == has_sizes and (has_sizes or candidate.unet.has_linear_projections == is_linear)
    )


def _says_prediction(path: Path) -> bool:
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


def _index(architecture: DiffusionArchitecture, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "_class_name": architecture.pipeline,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        **{encoder.part: ["transformers", encoder.model_class] for encoder in architecture.text_encoders},
        **{encoder.tokenizer: ["transformers", "CLIPTokenizer"] for encoder in architecture.text_encoders},
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        **{name: [None, None] for name in architecture.unused_components},
        **({"force_zeros_for_empty_prompt": True} if architecture.has_zero_empty_prompt else {}),
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
