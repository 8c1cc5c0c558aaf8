"""Files that are whole or not there, and where the program keeps its own."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.logs import logger

if TYPE_CHECKING:
    from torch import Tensor

_TEMPORARY = ".part-"
_LARGEST_TEXT_BYTES = 64 * 1024**2
_SURROGATES = re.compile("[\ud800-\udfff]")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; a file or folder written there takes the name when the block ends well.

    The content is flushed to the disk before the rename. A folder that stands under the name is replaced.

    Raises:
        OSError: it cannot be written; names a file, which Python leaves out where a disk fills up in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        _flush(temporary)
        _put(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if temporary.is_dir():
            _remove_folder(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _put(temporary: Path, path: Path) -> None:
    """Gives a file or folder its name; a folder that stands there, or that another process puts there, is replaced."""
    while True:
        old = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-old-{path.name}")
        if path.is_dir() and not path.is_symlink():
            with suppress(FileNotFoundError):  # another process was quicker
                path.rename(old)
        try:
            temporary.replace(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                raise
        finally:
            _remove_folder(old)


def is_text(name: str) -> bool:
    """Says whether a file name or an argument is UTF-8.

    Python reads the bytes that are none as lone surrogates, which can be neither printed nor stored.
    """
    return not _SURROGATES.search(name)


def not_a_file(path: Path) -> str | None:
    """Returns what a path is that is neither a file nor a folder, say "a pipe", or None.

    Opening a pipe waits for somebody who writes into it, and a device may have no end. What is not there, or cannot be
    looked at, gives None: opening it says why.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    names = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    return names.get(stat.S_IFMT(mode))


def user_path(name: str, setting: str) -> Path:
    """Returns a path in which a leading `~` or `~user` stands for the home folder.

    Args:
        name: as the user gave it.
        setting: where, for the message, say "data.path".

    Raises:
        ConfigError: nobody of that name is known here.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{setting}={name}: there is no home folder {Path(name).parts[0]} here; write the whole path."
        ) from error


def check_writable(folder: Path, setting: str) -> None:
    """Checks that a folder exists or could be made, and that files can be written into it; leaves nothing behind.

    Args:
        folder: what will be written into.
        setting: who asks for it, for the message, say "output.path".

    Raises:
        ConfigError: a file is in the way, or the access rights or the file system forbid it.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not nearest.is_dir():
        raise ConfigError(f"{setting}={folder}: {nearest} is a file or a broken link; name a folder.")
    try:
        # The access rights of /proc and the like allow what no one can do there.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ConfigError(
            f"{setting}={folder}: {nearest} cannot be written ({error.strerror}); correct its access rights or name "
            "another."
        ) from error


def remove_leftovers(folder: Path, depth: str = "", older_than_s: float = 0.0) -> None:
    """Deletes what `atomic_path` left in a folder when the process was killed.

    Args:
        folder: may be missing.
        depth: pattern of the folders below it that are looked at instead, such as "*/*/".
        older_than_s: younger ones stay; not 0 where other processes write too.
    """
    for leftover in folder.glob(f"{depth}{_TEMPORARY}*"):
        try:
            if older_than_s and time.time() - leftover.stat().st_mtime < older_than_s:
                continue
            # Of a link to a folder only the link is ours.
            if leftover.is_dir() and not leftover.is_symlink():
                _remove_folder(leftover)
            else:
                leftover.unlink()
        except OSError as error:  # another process takes it away too, writes into it, or owns it
            logger.debug("%s stays: %s", leftover, error)


def _remove_folder(folder: Path) -> None:
    """Deletes a folder; that another process deletes the same is no error."""
    while folder.exists():
        # At a file that is gone the standard library gives up, whatever else is left.
        with suppress(FileNotFoundError):
            shutil.rmtree(folder)


def _flush(path: Path) -> None:
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_whole(path: Path) -> bytes:
    """Returns the bytes of a file of a stranger that holds text.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is a pipe or a device, or larger than any text that this program reads at once.
    """
    if file_type := not_a_file(path):
        raise ValueError(f"it is {file_type} and no file")
    if (num_bytes := path.stat().st_size) > _LARGEST_TEXT_BYTES:
        raise ValueError(f"it has {num_bytes:,} bytes, and at most {_LARGEST_TEXT_BYTES:,} are read")
    return path.read_bytes()


def read_json(path: Path) -> Any:
    """Returns what a JSON file of a stranger holds.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: see `read_whole` and `parse_json`.
    """
    return parse_json(read_whole(path))


def parse_json(text: str | bytes) -> Any:
    """Returns what JSON of a stranger holds: values whose texts can be stored, printed and tokenized.

    Raises:
        ValueError: it is no JSON (a JSONDecodeError) or not UTF-8, nests more deeply than can be read, or holds a
            number of thousands of digits or half a character, as a text does that was cut inside an emoji.
    """
    if isinstance(text, bytes):
        # The standard library would guess other encodings, and take halves of characters.
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text)
        is_whole = "\\u" not in text or is_text(json.dumps(value, ensure_ascii=False))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError as error:
        raise ValueError("holds brackets in brackets too deep to be read") from error
    except ValueError as error:  # of int()
        raise ValueError("holds a number of too many digits to be read") from error
    if not is_whole:
        raise ValueError(
            "holds half a character (one of \\ud800 to \\udfff by itself), as texts do that were cut inside an emoji"
        )
    return value


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically, indented, with a final line break."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes records as a table with a header, atomically; all have the keys of the first."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, stream.getvalue())


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of any shape as a safetensors file.

    Raises:
        OSError: the disk is full or failing, which the library reports by an error of its own.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def sha256(path: Path) -> str:
    """Returns the hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """Returns the sha256 of a file; a file that did not change is read once by a process.

    Its length counts besides its time: file systems tell times some milliseconds apart as equal.
    """
    return _hash(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _hash(path: Path, changed_ns: int, num_bytes: int) -> str:
    del changed_ns, num_bytes
    return sha256(path)


def default_cache_path() -> Path:
    """Returns the folder for what can be made again: $LORA_DIFFUSION_CACHE, or lora-diffusion in the user's cache.

    Raises:
        ConfigError: the user has no home folder, as in containers that run under the number of an unknown user.
    """
    folder = os.environ.get("LORA_DIFFUSION_CACHE")
    if folder:
        return user_path(folder, "LORA_DIFFUSION_CACHE")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-diffusion"
    except RuntimeError as error:
        raise ConfigError(
            "There is no home folder to keep prepared samples in: HOME is not set, and this user has none; set "
            "LORA_DIFFUSION_CACHE to a folder that can be written."
        ) from error


def is_hub_id(name: str) -> bool:
    """Says whether a name is spelled as the ids of the hub are, and is no file or folder here."""
    is_spelled_so = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name) and not name.startswith(".")
    return bool(is_spelled_so) and not Path(name).exists()


def public_base(source: str) -> str | None:
    """Returns what others find a base by: a hub id or builtin:NAME; None for what lies on this machine alone.

    >>> public_base("/home/me/.cache/huggingface/hub/models--openai--whisper-tiny/snapshots/1a2b")
    'openai/whisper-tiny'
    """
    if source.startswith("builtin:") or is_hub_id(source):
        return source
    match = re.search(r"[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", source)
    return f"{match[1]}/{match[2]}" if match else None


def builtin_path(name: str) -> Path:
    """Returns the folder of a built-in model, say "emoji-sd"."""
    return Path(__file__).resolve().parents[1] / "builtin" / name


def shipped_path(name: str) -> Path:
    """Returns the folder "configs" or "datasets": inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / name if (package / name).is_dir() else package.parent / name
