"""Where a Stable Diffusion base comes from: built-in, diffusers folder, hub id, or single-file checkpoint."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_diffusion.architectures.clip_tokenizer import ClipTextLimit
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.base_model import BaseInfo, Loaded
from lora_diffusion.core.errors import LoraDiffusionError, MissingModelError, ModelError, UntrainableError
from lora_diffusion.core.files import builtin_path, content_hash, is_hub_id, user_path
from lora_diffusion.core.files import read_json as _read_json
from lora_diffusion.core.model_folder import check_plain, check_sizes
from lora_diffusion.core.text import shown, suggestion
from lora_diffusion.families.model_files import missing, missing_of_vae
from lora_diffusion.families.stable_diffusion.components import (
    LAYOUTS,
    Layout,
    as_loaded,
    build_skeleton,
    check_family,
    describe,
    load_dtypes,
    shared_skeleton,
)
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
_SCHEDULER = re.compile(r"diffusers\.\w+Scheduler")
_FORMS = "a diffusers folder, a .safetensors checkpoint or a hub id"


class Source(Protocol):
    """A base model on disk."""

    def info(self, options: Any) -> BaseInfo:
        """Describes the base."""

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds the parts on the meta device."""

    def outline(self) -> Mapping[str, nn.Module]:
        """Returns the parts on the meta device, which nobody may change; asked again it costs nothing."""

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the base, frozen and in eval mode."""

    def fingerprint(self, components: Sequence[str]) -> str:
        """Names the weights of these components by their content."""


def find(options: ModelOptions) -> Source:
    """Returns the source that `model.path` means.

    Raises:
        ModelError: nothing is there, or it is not a base of `model.family`.
        UnsupportedError: the frozen weights cannot be stored as asked.
    """
    if options.quantization != "none":
        from lora_diffusion.quantize import check

        check(options.quantization)
    layout = LAYOUTS[options.family]
    path = local(options.path, _BUILTIN, _HUB_PATTERNS, _FORMS)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"model.path={options.path} is a pickle, which can run code when it is loaded; "
            "take the .safetensors version of this checkpoint."
        )
    if path.is_file():
        from lora_diffusion.families.stable_diffusion.single_file import SingleFile

        return SingleFile(path, layout)
    if is_hub_id(options.path):
        _fetch_other_weights(options.path, path, layout)
    return Folder(path, layout)


def _fetch_other_weights(name: str, path: Path, layout: Layout) -> None:
    """Fetches weights of the networks for which a hub repository holds no plain file."""
    for ending in _OTHER_WEIGHTS:
        lacking = [one for one in layout.networks if not _weight_files(path / one, _weights(one))]
        if lacking:
            _download(name, tuple(f"{one}/{_weights(one)}{ending}.safetensors" for one in lacking))


def unwanted(layout: Layout) -> dict[str, None]:
    """Returns arguments that keep a pipeline from loading what is not needed."""
    return dict.fromkeys(layout.unwanted)


def cache_key(options: ModelOptions, trained: frozenset[str], pieces: frozenset[str]) -> str:
    """Names all that pieces of a prepared item depend on besides the sample: encoders that are not trained, and how.

    The layer that is read is named only where it is not the usual one, so that older caches stay right.
    """
    layout = LAYOUTS[options.family]
    texts = [*layout.tokenizers, *(tower for tower in layout.towers if tower not in trained)]
    frozen = [*(["vae"] if "views" in pieces else []), *(texts if "texts" in pieces else [])]
    settings = [frozen_name(options.dtype, pick_device())]
    if "texts" not in pieces:
        return f"{options.family} {find(options).fingerprint(frozen)} {settings[0]}"
    settings += [options.quantization] if options.quantization != "none" else []
    if (skip := getattr(options, "clip_skip", None)) is not None:
        settings.append(f"clip_skip={skip}")
    if getattr(options, "prior_weight", 0):
        settings.append("priors")
    # Of a trained encoder the item holds token ids; the hash of a single file is the same with and without it.
    settings += [f"ids of {tower}" for tower in layout.towers if tower in trained]
    return f"{options.family} {find(options).fingerprint(frozen)} {' '.join(settings)}"


def local(name: str, builtins: Mapping[str, str], patterns: Sequence[str], forms: str) -> Path:
    """Returns the file or folder that `model.path` means, fetched from the hub if it is an id.

    Args:
        name: `model.path`.
        builtins: name after "builtin:" -> folder that comes along.
        patterns: files of a hub repository that are needed.
        forms: what else could be given, for messages.

    Raises:
        ModelError: there is nothing of that name.
    """
    known = " or ".join(f"builtin:{builtin}" for builtin in builtins)
    if name.startswith("builtin:"):
        if name.removeprefix("builtin:") not in builtins:
            raise ModelError(f"model.path={name}: there is no such built-in base of this family; known: {known}.")
        return builtin_path(builtins[name.removeprefix("builtin:")])
    path = user_path(name, "model.path")
    if path.exists():
        return path
    if is_hub_id(name):
        return _download(name, tuple(patterns))
    near = suggestion(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise MissingModelError(
        f"model.path={name}: there is no such folder or file{near}.", f"Give {known}, {forms} such as owner/name."
    )


@cache
def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["safety_checker/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.path={name} is neither a folder or file here nor a model that the hub gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


@dataclass(frozen=True)
class Folder:
    """A diffusers pipeline folder."""

    path: Path
    layout: Layout

    def info(self, options: Any) -> BaseInfo:
        """Reads the component configs."""
        try:
            with explained(self.path):
                info = describe(self._configs(), self.layout, options)
        except UntrainableError as error:
            raise UntrainableError(str(error), self.path) from error
        networks = [file for name in ("unet", *self.layout.towers) for file in self._weight_files(name)]
        files = (*networks, self.path / "scheduler" / "scheduler_config.json")
        limit = ClipTextLimit(self.path / self.layout.tokenizers[0])
        return replace(info, path=self.path, files=files, text_limit=limit)

    def skeleton(self) -> dict[str, nn.Module]:
        """Builds UNet and text encoders from their configs, once the weight files hold all tensors of these."""
        self.outline()
        return build_skeleton(self._configs(), self.layout)

    def outline(self) -> Mapping[str, nn.Module]:
        """Returns UNet and text encoders of their configs, once the weight files hold all tensors of these."""
        configs = self._configs()
        with explained(self.path):
            parts = shared_skeleton(configs, self.layout)
            lacking = {name: missing(part, self._weight_files(name)) for name, part in parts.items()}
            lacking["vae"] = missing_of_vae(configs["vae"], self._weight_files("vae"))
        faults = [f"{name}/{tensor}" for name, tensors in lacking.items() for tensor in tensors]
        if faults:
            raise ModelError(
                f"The base {self.path} lacks {len(faults)} tensors that its configs announce; fetch it again.",
                faults[:10],
            )
        return parts

    def load(self, options: Any, device: torch.device) -> Loaded:
        """Loads the folder; pickled weights are refused."""
        import diffusers

        silence_progress()
        info = self.info(options)
        self.outline()
        is_half = ".fp16" in self._weight_files("unet")[0].name
        with explained(self.path):
            pipeline = getattr(diffusers, self.layout.pipeline).from_pretrained(
                self.path,
                dtype=load_dtypes(options, self._configs(), device),
                variant="fp16" if is_half else None,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **unwanted(self.layout),
            )
            return as_loaded(pipeline, self.layout, options, device, info)

    def fingerprint(self, components: Sequence[str]) -> str:
        """Hashes every file of the components' folders."""
        files = [file for name in components for file in sorted((self.path / name).iterdir()) if file.is_file()]
        return " ".join(f"{file.parent.name}/{file.name}={content_hash(file)}" for file in files)

    def _weight_files(self, name: str) -> list[Path]:
        """Returns those that are loaded: in half precision only where there are no others."""
        files = _weight_files(self.path / name, _weights(name))
        plain = [file for file in files if not file.name.removeprefix(_weights(name)).startswith(".fp16")]
        return plain or files

    def _configs(self) -> dict[str, dict[str, Any]]:
        check_plain(self.path, f"The base {self.path}")
        with explained(self.path):
            return self._read_configs()

    def _read_configs(self) -> dict[str, dict[str, Any]]:
        self._check_family()
        networks = self.layout.networks
        faults = [fault for name in networks if (fault := self._fault(name))]
        for name in self.layout.tokenizers:
            if not any((self.path / name / file).is_file() for file in ("vocab.json", "tokenizer.json")):
                faults.append(f"{name}: {self.path / name / 'vocab.json'} is missing")
        if faults:
            files = sorted(self.path.glob("*.safetensors"))
            hint = f" For a checkpoint in one file give the file, say model.path={files[0]}." if files else ""
            folders = ", ".join(f"{name}/" for name in (*networks, *self.layout.tokenizers))
            raise ModelError(
                f"The base {self.path} is not a complete {self.layout.title} folder; it must hold {folders} and "
                f"scheduler/, each as diffusers saves it.{hint}",
                faults,
            )
        _check_index(self.path, self.layout)
        configs = {name: read_json(self.path / name / "config.json") for name in networks}
        for name, config in configs.items():
            check_sizes(config, f"The {name} of {self.path}")
        return configs | {"scheduler": read_json(self.path / "scheduler" / "scheduler_config.json")}

    def _check_family(self) -> None:
        """Names the right family before anything that this one would miss is listed."""
        files = [self.path / name / "config.json" for name in ("unet", "text_encoder")]
        if files[0].is_file():
            unet, text = (read_json(file) if file.is_file() else {} for file in files)
            check_family(self.layout, unet, text, str(self.path))

    def _fault(self, name: str) -> str | None:
        folder, stem = self.path / name, _weights(name)
        if not (folder / "config.json").is_file():
            return f"{name}: {folder / 'config.json'} is missing"
        weights = self._weight_files(name)
        if not weights and list(folder.glob("*.bin")):
            return f"{name}: {folder} holds pickled weights (.bin) only, which can run code; fetch the .safetensors"
        if not weights:
            return f"{name}: {folder / stem}.safetensors is missing"
        return next((fault for file in weights if (fault := damage(file))), None)


def _check_index(folder: Path, layout: Layout) -> None:
    """Checks that the index of a folder names classes of the family only: others could load what runs code.

    Raises:
        ModelError: it is missing, or names another.
    """
    index = read_json(folder / _INDEX)
    wanted = {name: [f"diffusers.{kind}"] for name, kind in _NETWORKS.items()}
    wanted |= {name: [f"transformers.{kind}"] for name, kind in layout.towers.items()}
    wanted |= {name: ["transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"] for name in layout.tokenizers}
    faults = []
    for name, kinds in wanted.items():
        told = _told(index, name)
        if told not in kinds:
            faults.append(f"{name}: it is {shown(told)}, not {' or '.join(kinds)}")
    if not _SCHEDULER.fullmatch(_told(index, "scheduler")):
        faults.append(f"scheduler: it is {shown(_told(index, 'scheduler'))}, not one of diffusers")
    if faults:
        raise ModelError(
            f"{folder / _INDEX} names parts that {layout.title} does not have, and that could run code; fetch the base "
            "from its author again.",
            faults,
        )


def _told(index: Mapping[str, Any], name: str) -> str:
    value = index.get(name)
    return ".".join(map(str, value)) if isinstance(value, list) else str(value)


def _weights(name: str) -> str:
    """Returns the name of a component's weight file without ending, as transformers or diffusers calls it."""
    return "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"


def _weight_files(folder: Path, stem: str) -> list[Path]:
    endings = ("", ".fp16", "-*", ".fp16-*")
    return [file for ending in endings for file in sorted(folder.glob(f"{stem}{ending}.safetensors"))]


def damage(path: Path) -> str | None:
    """Says whether a safetensors file is cut off or none at all, by its header and length; read once while unchanged.

    Its length counts besides its time: file systems tell times some milliseconds apart as equal.
    """
    try:
        return _damage(path, path.stat().st_mtime_ns, path.stat().st_size)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror}); correct its link or access rights, or fetch it again"


@cache
def _damage(path: Path, changed_ns: int, num_bytes: int) -> str | None:
    from safetensors import SafetensorError, safe_open

    del changed_ns, num_bytes
    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        with path.open("rb") as stream:
            start = stream.read(8)
        if start == b"version ":
            return f"{path} is a Git LFS pointer, not the weights; fetch them with 'git lfs pull'"
        return f"{path} is cut off or damaged ({error}); fetch it again"


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what libraries raise on wrong configs and weights into a ModelError; running out of memory stays."""
    try:
        yield
    except (LoraDiffusionError, MemoryError):
        raise
    except Exception as error:  # tokenizers raise nothing more exact, and configs are checked by many libraries
        torch = sys.modules.get("torch")  # reading configs needs none of it
        if torch and isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"{type(error).__name__}: {shown(' '.join(str(error).split()), 500)}"
        raise ModelError(f"The base {path} cannot be used; a config or its weights are wrong. {what}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Returns a JSON object from a file of the base.

    Raises:
        ModelError: missing or damaged.
    """
    try:
        return dict(_read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} of the base cannot be read as a JSON object ({error}); fetch it again.") from error


def silence_progress() -> None:
    """Turns off the bars that diffusers and transformers draw while they load: they take a second and say nothing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
