"""Where a Stable Diffusion base comes from: built-in, diffusers folder, hub id, or single-file checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import ModelError, UntrainableError
from lora_diffusion.core.files import content_hash, is_hub_id
from lora_diffusion.core.model_folder import check_plain, check_sizes
from lora_diffusion.core.text import shown
from lora_diffusion.families.model_files import (
    damage,
    download,
    explained,
    find_local,
    missing,
    read_json,
    silence_progress,
    weight_files,
)
from lora_diffusion.families.stable_diffusion.components import (
    as_loaded,
    check_family,
    describe,
    load_dtypes,
    meta_modules,
    missing_of_vae,
    shared_meta_modules,
)
from lora_diffusion.families.stable_diffusion.options import StableDiffusionOptions
from lora_diffusion.families.stable_diffusion.single_file import SingleFile
from lora_diffusion.runtime.device import frozen_name, pick_device

if TYPE_CHECKING:
    import torch
    from torch import nn

_BUILTIN = {"emoji": "emoji-sd"}
_HUB_PATTERNS = ("*.json", "*/*.json", "*/*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors")
_OTHER_WEIGHTS = ("-*", ".fp16", ".fp16-*")
"""How weights end where a hub repository holds no plain ones, best first: in pieces, in half precision, both."""
_INDEX = "model_index.json"
_NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
_SCHEDULER = re.compile(r"diffusers\.\w+Scheduler")
_FORMS = "a diffusers folder, a .safetensors checkpoint or a hub id"


class Source(Protocol):
    """A base model on disk."""

    def info(self, options: Any) -> BaseInfo:
        """Describes the base."""

    def meta_modules(self) -> dict[str, nn.Module]:
        """Builds the parts on the meta device."""

    def shared_meta_modules(self) -> Mapping[str, nn.Module]:
        """Returns the parts on the meta device, which nobody may change; asked again it costs nothing."""

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the base, frozen and in eval mode."""

    def fingerprint(self, components: Sequence[str]) -> str:
        """Names the weights of these components by their content."""


def find(architecture: DiffusionArchitecture, options: ModelOptions) -> Source:
    """Returns the source that `model.path` means.

    Raises:
        ModelError: nothing is there, or it is not a base of `model.family`.
        UnsupportedError: the frozen weights cannot be stored as asked.
    """
    if options.quantization != "none":
        from lora_diffusion.quantize import check

        check(options.quantization)
    path = find_local(options.path, _BUILTIN, _HUB_PATTERNS, _FORMS)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"model.path={options.path} is a pickle, which can run code when it is loaded; "
            "take the .safetensors version of this checkpoint."
        )
    if path.is_file():
        return SingleFile(path, architecture)
    if is_hub_id(options.path):
        _fetch_other_weights(options.path, path, architecture)
    return Folder(path, architecture)


def _fetch_other_weights(name: str, path: Path, architecture: DiffusionArchitecture) -> None:
    """Fetches weights of the networks for which a hub repository holds no plain file."""
    for ending in _OTHER_WEIGHTS:
        lacking = [one for one in architecture.networks if not weight_files(path / one, _weights(one))]
        if lacking:
            download(name, tuple(f"{one}/{_weights(one)}{ending}.safetensors" for one in lacking))


def cache_key(
    architecture: DiffusionArchitecture,
    options: StableDiffusionOptions,
    trained: frozenset[str],
    pieces: frozenset[str],
) -> str:
    """Names all that pieces of a prepared item depend on besides the sample: encoders that are not trained, and how.

    The layer that is read is named only where it is not the usual one, so that older caches stay right.
    """
    encoders = architecture.text_encoders
    texts = [encoder.tokenizer for encoder in encoders]
    texts += [encoder.part for encoder in encoders if encoder.part not in trained]
    frozen = [*(["vae"] if "views" in pieces else []), *(texts if "texts" in pieces else [])]
    settings = [frozen_name(options.dtype, pick_device())]
    weights = find(architecture, options).fingerprint(frozen)
    if "texts" not in pieces:
        return f"{architecture.name} {weights} {settings[0]}"
    settings += [options.quantization] if options.quantization != "none" else []
    if options.clip_skip is not None:
        settings.append(f"clip_skip={options.clip_skip}")
    if options.prior_weight:
        settings.append("priors")
    if options.anchor_weight:
        settings.append(f"{options.anchored.what} anchors")
    # Of a trained encoder the item holds token ids; the hash of a single file is the same with and without it.
    settings += [f"ids of {encoder.part}" for encoder in encoders if encoder.part in trained]
    return f"{architecture.name} {weights} {' '.join(settings)}"


@dataclass(frozen=True)
class Folder:
    """A diffusers pipeline folder."""

    path: Path
    architecture: DiffusionArchitecture

    def info(self, options: Any) -> BaseInfo:
        """Reads the component configs."""
        try:
            with explained(self.path):
                info = describe(self._configs(), self.architecture, options)
        except UntrainableError as error:
            raise UntrainableError(str(error), self.path) from error
        networks = [file for name in self.architecture.networks if name != "vae" for file in self._weight_files(name)]
        files = (*networks, self.path / "scheduler" / "scheduler_config.json")
        limit = ClipTextLimit(self.path / self.architecture.text_encoders[0].tokenizer)
        return replace(info, path=self.path, files=files, text_limit=limit)

    def meta_modules(self) -> dict[str, nn.Module]:
        """Builds UNet and text encoders from their configs, once the weight files hold all tensors of these."""
        self.shared_meta_modules()
        return meta_modules(self._configs(), self.architecture)

    def shared_meta_modules(self) -> Mapping[str, nn.Module]:
        """Returns UNet and text encoders of their configs, once the weight files hold all tensors of these."""
        configs = self._configs()
        with explained(self.path):
            parts = shared_meta_modules(configs, self.architecture)
            lacking = {name: missing(part.state_dict(), self._weight_files(name)) for name, part in parts.items()}
            lacking["vae"] = missing_of_vae(configs["vae"], self._weight_files("vae"))
        errors = [f"{name}/{tensor}" for name, tensors in lacking.items() for tensor in tensors]
        if errors:
            raise ModelError(
                f"The base {self.path} lacks {len(errors)} tensors that its configs announce; fetch it again.",
                errors[:10],
            )
        return parts

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the folder; pickled weights are refused."""
        import diffusers

        silence_progress()
        info = self.info(options)
        self.shared_meta_modules()
        is_half = ".fp16" in self._weight_files("unet")[0].name
        with explained(self.path):
            pipeline = getattr(diffusers, self.architecture.pipeline).from_pretrained(
                self.path,
                dtype=load_dtypes(options, self._configs(), self.architecture, device),
                variant="fp16" if is_half else None,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **dict.fromkeys(self.architecture.unused_components),
            )
            return as_loaded(pipeline, self.architecture, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes every file of the components' folders."""
        files = [file for name in components for file in sorted((self.path / name).iterdir()) if file.is_file()]
        return " ".join(f"{file.parent.name}/{file.name}={content_hash(file)}" for file in files)

    def _weight_files(self, name: str) -> list[Path]:
        """Returns those that are loaded: in half precision only where there are no others."""
        files = weight_files(self.path / name, _weights(name))
        plain = [file for file in files if not file.name.removeprefix(_weights(name)).startswith(".fp16")]
        return plain or files

    def _configs(self) -> dict[str, dict[str, Any]]:
        check_plain(self.path, f"The base {self.path}")
        with explained(self.path):
            return self._read_configs()

    def _read_configs(self) -> dict[str, dict[str, Any]]:
        self._check_family()
        networks = self.architecture.networks
        errors = [error for name in networks if (error := self._error(name))]
        for name in self._tokenizers():
            if not any((self.path / name / file).is_file() for file in ("vocab.json", "tokenizer.json")):
                errors.append(f"{name}: {self.path / name / 'vocab.json'} is missing")
        if errors:
            files = sorted(self.path.glob("*.safetensors"))
            hint = f" For a checkpoint in one file give the file, say model.path={files[0]}." if files else ""
            folders = ", ".join(f"{name}/" for name in (*networks, *self._tokenizers()))
            raise ModelError(
                f"The base {self.path} is not a complete {self.architecture.title} folder; it must hold {folders} and "
                f"scheduler/, each as diffusers saves it.{hint}",
                errors,
            )
        _check_index(self.path, self.architecture)
        configs = {name: read_json(self.path / name / "config.json") for name in networks}
        for name, config in configs.items():
            check_sizes(config, f"The {name} of {self.path}")
        return configs | {"scheduler": read_json(self.path / "scheduler" / "scheduler_config.json")}

    def _check_family(self) -> None:
        """Names the right family before anything that this one would miss is listed."""
        files = [self.path / name / "config.json" for name in ("unet", "text_encoder")]
        if files[0].is_file():
            unet, text = (read_json(file) if file.is_file() else {} for file in files)
            check_family(self.architecture, unet, text, str(self.path))

    def _tokenizers(self) -> list[str]:
        return [encoder.tokenizer for encoder in self.architecture.text_encoders]

    def _error(self, name: str) -> str | None:
        folder, stem = self.path / name, _weights(name)
        if not (folder / "config.json").is_file():
            return f"{name}: {folder / 'config.json'} is missing"
        weights = self._weight_files(name)
        if not weights and list(folder.glob("*.bin")):
            return f"{name}: {folder} holds pickled weights (.bin) only, which can run code; fetch the .safetensors"
        if not weights:
            return f"{name}: {folder / stem}.safetensors is missing"
        return next((error for file in weights if (error := damage(file))), None)


def _check_index(folder: Path, architecture: DiffusionArchitecture) -> None:
    """Checks that the index of a folder names classes of the family only: others could load what runs code.

    Raises:
        ModelError: it is missing, or names another.
    """
    index = read_json(folder / _INDEX)
    wanted = {name: [f"diffusers.{one}"] for name, one in _NETWORKS.items()}
    wanted |= {encoder.part: [f"transformers.{encoder.model_class}"] for encoder in architecture.text_encoders}
    wanted |= {encoder.tokenizer: list(_TOKENIZERS) for encoder in architecture.text_encoders}
    errors = []
    for name, classes in wanted.items():
        named = _class_name(index, name)
        if named not in classes:
            errors.append(f"{name}: it is {shown(named)}, not {' or '.join(classes)}")
    if not _SCHEDULER.fullmatch(_class_name(index, "scheduler")):
        errors.append(f"scheduler: it is {shown(_class_name(index, 'scheduler'))}, not one of diffusers")
    if errors:
        raise ModelError(
            f"{folder / _INDEX} names parts that {architecture.title} does not have, and that could run code; fetch "
            "the base from its author again.",
            errors,
        )


def _class_name(index: Mapping[str, Any], name: str) -> str:
    value = index.get(name)
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def _weights(name: str) -> str:
    """Returns the name of a component's weight file without ending, as transformers or diffusers calls it."""
    return "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
