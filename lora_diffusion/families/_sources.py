"""Where a Stable Diffusion base comes from: built-in, diffusers folder, hub id, or single-file checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.errors import ModelError, UnsupportedError
from lora_diffusion.core.files import builtin_path, sha256
from lora_diffusion.core.keymap import suggestion
from lora_diffusion.core.types import BaseInfo, Loaded

if TYPE_CHECKING:
    import torch
    from torch import nn

_BUILTIN = {"emoji": "emoji-sd"}
_HUB_PATTERNS = ["*.json", "*/*.json", "*/*.txt", "*/model.safetensors", "*/diffusion_pytorch_model.safetensors"]
_WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Component -> name of its weight file without ending, as diffusers and transformers call it."""
_WIDTH_OF_SD2 = 1024


class Source(Protocol):
    """A base model on disk."""

    def info(self, options: Any) -> BaseInfo:
        """Describes the base."""

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds the parts on the meta device."""

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the base, frozen and in eval mode."""

    def fingerprint(self, components: Sequence[str]) -> str:
        """Names the weights of these components by their content."""


def find(options: ModelOptions) -> Source:
    """Returns the source that `model.path` means.

    Raises:
        ModelError: nothing is there, or it is not a Stable Diffusion 1.x base.
        UnsupportedError: the frozen weights cannot be stored as asked.
    """
    if options.quantization != "none":
        raise UnsupportedError(
            f"model.quantization={options.quantization} is not available for Stable Diffusion 1 yet; set it to none."
        )
    path = _local(options.path)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"model.path={options.path} is a pickle, which can run code when it is loaded; "
            "take the .safetensors version of this checkpoint."
        )
    if path.is_file():
        from lora_diffusion.families._single_file import SingleFile

        return SingleFile(path)
    return Folder(path)


def _local(name: str) -> Path:
    if name.startswith("builtin:"):
        known = name.removeprefix("builtin:")
        if known not in _BUILTIN:
            raise ModelError(f"model.path={name}: there is no such built-in base; known: builtin:emoji.")
        return builtin_path(_BUILTIN[known])
    path = Path(name).expanduser()
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return _download(name)
    near = suggestion(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise ModelError(
        f"model.path={name}: there is no such folder or file{near}. Give builtin:emoji, a diffusers folder, "
        "a .safetensors checkpoint or a hub id such as owner/name."
    )


@cache
def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=["safety_checker/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.path={name} is neither a folder or file here nor a model that the hub gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True)
class Folder:
    """A diffusers StableDiffusionPipeline folder."""

    path: Path

    def info(self, options: Any) -> BaseInfo:
        """Reads the component configs."""
        with explained(self.path):
            return describe(self._configs(), options.path, options.prediction)

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds UNet and text encoder from their configs."""
        with explained(self.path):
            parts = build_skeleton(self._configs())
        self._check_complete(parts["unet"])
        return parts

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the folder; pickled weights are refused."""
        from diffusers import StableDiffusionPipeline

        from lora_diffusion.core.device import frozen_dtype

        silence_progress()
        info = self.info(options)
        dtype = frozen_dtype(options.dtype, device)
        has_plain = (self.path / "unet" / f"{_WEIGHTS['unet']}.safetensors").is_file()
        with explained(self.path):
            pipeline = StableDiffusionPipeline.from_pretrained(
                self.path,
                dtype=dtype,
                variant=None if has_plain else "fp16",
                local_files_only=True,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        return as_loaded(pipeline, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes every file of the components' folders."""
        files = [file for name in components for file in sorted((self.path / name).iterdir()) if file.is_file()]
        return " ".join(f"{file.parent.name}/{file.name}={content_hash(file)}" for file in files)

    def _check_complete(self, unet: nn.Module) -> None:
        """Refuses a UNet whose files lack tensors: diffusers would fill them with random numbers."""
        from safetensors import safe_open

        names: set[str] = set()
        for file in _weight_files(self.path / "unet", _WEIGHTS["unet"]):
            with safe_open(file, framework="np") as weights:
                names.update(weights.keys())
        missing = sorted(unet.state_dict().keys() - names)
        if missing:
            raise ModelError(
                f"The UNet of {self.path} lacks {len(missing)} tensors that its config announces; fetch it again.",
                missing[:10],
            )

    def _configs(self) -> dict[str, dict[str, Any]]:
        faults = [fault for name in _WEIGHTS if (fault := self._fault(name))]
        if not any((self.path / "tokenizer" / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            faults.append(f"tokenizer: {self.path / 'tokenizer' / 'vocab.json'} is missing")
        if faults:
            files = sorted(self.path.glob("*.safetensors"))
            hint = f" For a checkpoint in one file give the file, say model.path={files[0]}." if files else ""
            raise ModelError(
                f"The base {self.path} is not a complete Stable Diffusion folder; it must hold unet/, vae/, "
                f"text_encoder/, tokenizer/ and scheduler/, each as diffusers saves it.{hint}",
                faults,
            )
        return {name: read_json(self.path / name / "config.json") for name in _WEIGHTS} | {
            "scheduler": read_json(self.path / "scheduler" / "scheduler_config.json")
        }

    def _fault(self, name: str) -> str | None:
        folder, stem = self.path / name, _WEIGHTS[name]
        if not (folder / "config.json").is_file():
            return f"{name}: {folder / 'config.json'} is missing"
        weights = _weight_files(folder, stem)
        if not weights and list(folder.glob("*.bin")):
            return f"{name}: {folder} holds pickled weights (.bin) only, which can run code; fetch the .safetensors"
        if not weights:
            return f"{name}: {folder / stem}.safetensors is missing"
        return next((fault for file in weights if (fault := _damage(file, file.stat().st_mtime_ns))), None)


def _weight_files(folder: Path, stem: str) -> list[Path]:
    endings = ("", ".fp16", "-*", ".fp16-*")
    return [file for ending in endings for file in sorted(folder.glob(f"{stem}{ending}.safetensors"))]


@cache
def _damage(path: Path, changed_ns: int) -> str | None:
    """Says whether a safetensors file is cut off or none at all, by its header and length."""
    from safetensors import SafetensorError, safe_open

    del changed_ns
    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        if path.read_bytes()[:8] == b"version ":
            return f"{path} is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"
        return f"{path} is cut off or damaged ({error}); fetch it again"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what libraries raise on wrong configs and weights into a ModelError; running out of memory stays."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(f"The base {path} cannot be used; a config or its weights are wrong. {what}") from error


def content_hash(path: Path) -> str:
    """Returns the sha256 of a file; a file that did not change is read once."""
    return _hash(path, path.stat().st_mtime_ns)


@cache
def _hash(path: Path, changed_ns: int) -> str:
    del changed_ns
    return sha256(path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object from a file of the base.

    Raises:
        ModelError: missing or damaged.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} of the base cannot be read as a JSON object ({error}); fetch it again.") from error


def describe(configs: Mapping[str, Mapping[str, Any]], path: str, kind: str) -> BaseInfo:
    """Returns what the component configs say of a base; `kind` is `model.prediction`.

    Raises:
        ModelError: the UNet is one of SDXL, inpainting or another family.
    """
    unet, vae, text = configs["unet"], configs["vae"], configs["text_encoder"]
    if unet.get("addition_embed_type"):
        raise ModelError(f"The base {path} is Stable Diffusion XL, not 1.x; set model.family to its family.")
    if unet.get("cross_attention_dim") == _WIDTH_OF_SD2:
        raise ModelError(f"The base {path} is Stable Diffusion 2, not 1.x; set model.family to its family.")
    if unet.get("in_channels", 4) != vae.get("latent_channels", 4):
        raise ModelError(
            f"The UNet of {path} takes {unet.get('in_channels')} channels: inpainting bases cannot be trained."
        )
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        raise ModelError(
            f"The base {path} does not fit together: the UNet expects text of width {unet.get('cross_attention_dim')}, "
            f"the text encoder gives {text.get('hidden_size')}."
        )
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return BaseInfo(
        resolution=int(unet["sample_size"]) * factor,
        size_step=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        architecture="stable-diffusion-v1",
        prediction=kind if kind != "auto" else configs["scheduler"].get("prediction_type", "epsilon"),
        source=path,
    )


def build_skeleton(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Returns UNet and text encoder on the meta device."""
    import torch
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(dict(configs["unet"])),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
        }


def silence_progress() -> None:
    """Turns off the bars that diffusers and transformers draw while they load: they take a second and say nothing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def as_loaded(pipeline: Any, options: Any, device: torch.device, info: BaseInfo) -> Loaded:
    """Freezes a pipeline's networks and sorts its components into parts and modules."""
    from lora_diffusion.diffusion.noise import NoiseSchedule
    from lora_diffusion.diffusion.prediction import find_prediction

    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        network.requires_grad_(False).eval().to(device)
    pipeline.scheduler.register_to_config(prediction_type=info.prediction)
    modules = {
        "vae": pipeline.vae,
        "tokenizer": pipeline.tokenizer,
        "scheduler": pipeline.scheduler,
        "schedule": NoiseSchedule(pipeline.scheduler.alphas_cumprod.float()),
        "prediction": find_prediction(info.prediction),
        "scaling_factor": float(pipeline.vae.config.scaling_factor),
    }
    return Loaded(
        parts={"unet": pipeline.unet, "text_encoder": pipeline.text_encoder},
        modules=modules,
        options=options,
        device=device,
        info=info,
        encoders=frozenset({"text_encoder", "vae"}),
        decoders=frozenset({"vae"}),
    )
