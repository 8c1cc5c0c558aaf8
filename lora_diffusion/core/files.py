"""Files that are whole or not there, and where the program keeps its own."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import ConfigError

_TEMPORARY = ".part-"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; a file or folder written there takes the name when the block ends well.

    The content is flushed to the disk before the rename. A folder that stands under the name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            old = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-old-{path.name}")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def check_writable(folder: Path, setting: str) -> None:
    """Checks that a folder exists or could be made, and that files can be written into it; changes nothing.

    Args:
        folder: what will be written into.
        setting: who asks for it, for the message, say "output.path".

    Raises:
        ConfigError: a file is in the way, or the access rights forbid it.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise ConfigError(f"{setting}={folder}: {nearest} is a file or a broken link; name a folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{setting}={folder}: {nearest} cannot be written; correct its access rights or name another."
        )


def remove_leftovers(folder: Path) -> None:
    """Deletes what `atomic_path` left in a folder when the process was killed."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _flush(path: Path) -> None:
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, indented, with a final line break."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Returns the hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def default_cache_path() -> Path:
    """Returns the folder for what can be made again: $LORA_DIFFUSION_CACHE, or lora-diffusion in the user's cache."""
    own = os.environ.get("LORA_DIFFUSION_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-diffusion"


def builtin_path(name: str) -> Path:
    """Returns the folder of a built-in model, say "emoji-sd"."""
    return Path(__file__).resolve().parents[1] / "builtin" / name


def shipped_path(name: str) -> Path:
    """Returns the folder "configs" or "datasets": inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name
