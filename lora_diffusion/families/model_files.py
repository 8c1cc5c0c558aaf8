"""The files of a base: built-in, here or on the hub; whether they are whole, and what libraries raise if not."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import LoraDiffusionError, MissingModelError, ModelError
from lora_diffusion.core.files import builtin_path, is_hub_id, user_path
from lora_diffusion.core.files import read_json as _read_json
from lora_diffusion.core.text import shown, suggestion

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""How published VAEs name the layers of their attention -> how diffusers does now; it reads both."""
_OLD_LAYER = re.compile(rf"(?<=\.attentions\.)(\d+)\.({'|'.join(_OLD_ATTENTION)})(?=\.)")


def find_local(name: str, builtins: Mapping[str, str], patterns: Sequence[str], forms: str) -> Path:
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
        return download(name, tuple(patterns))
    near = suggestion(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise MissingModelError(
        f"model.path={name}: there is no such folder or file{near}.", f"Give {known}, {forms} such as owner/name."
    )


@cache
def download(name: str, patterns: tuple[str, ...]) -> Path:
    """Returns the snapshot of a hub repository with the files of these patterns, fetched once in a process.

    Raises:
        ModelError: the hub gives none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["safety_checker/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model.path={name} is neither a folder or file here nor a model that the hub gives: "
            f"{str(error).splitlines()[0]}"
        ) from error


def weight_files(folder: Path, stem: str) -> list[Path]:
    """Returns the weights of a network: whole, in half precision, or in pieces, those that are preferred first."""
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
    """Turns off the bars that diffusers and transformers show while they load: they take a second and say nothing."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def missing(expected: Iterable[str], files: Sequence[Path]) -> list[str]:
    """Returns those names of tensors that none of the safetensors files of a network holds, by their headers.

    Libraries fill what is missing with random numbers.
    """
    held = {name for file in files for name in _names(file, file.stat().st_mtime_ns, file.stat().st_size)}
    return sorted({_today(name) for name in expected} - held)


def _today(name: str) -> str:
    """Spells a tensor's name without what versions of diffusers and transformers disagree on."""
    name = _OLD_LAYER.sub(lambda match: f"{match[1]}.{_OLD_ATTENTION[match[2]]}", name)
    return name.removeprefix("text_model.")  # transformers 5.6 dropped this level


@cache
def _names(file: Path, changed_ns: int, num_bytes: int) -> frozenset[str]:
    from safetensors import safe_open

    del changed_ns, num_bytes
    with safe_open(file, framework="np") as weights:
        return frozenset(map(_today, weights.keys()))
