"""The files of a data set, and the end of a check that lists all that is wrong with them."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.files import content_hash, is_text, not_a_file, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown

_NUM_SHOWN = 2
"""Errors of samples that are left out, in the warning."""
_LONGEST_ERROR = 1000
"""Characters of one error: names of strangers may be long and hold line breaks."""
LARGEST_TABLE_BYTES = 2 * 2**30
"""Twice the largest list of conversations that people train on."""


@dataclass(frozen=True)
class Folder:
    """The files of a data set, sorted; nothing in it is ever changed."""

    root: Path
    noun: str
    """What messages call the files, say "images"."""
    files: tuple[Path, ...]
    """Those to train on."""
    others: tuple[Path, ...]
    given: str = ""
    """What the user gave, for messages, say "data.path=images"; "" stands for data.path and the root."""
    left_out: frozenset[Path] = frozenset()
    """Files that are there for something else, or of splits that are not asked for; tables may name them."""

    def name(self, path: Path) -> str:
        """Returns a path as the user knows it: below the folder, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    @cached_property
    def by_stem(self) -> dict[Path, tuple[Path, ...]]:
        """The files to train on by their path without ending; each accented letter is one character."""
        stems: dict[Path, tuple[Path, ...]] = {}
        for file in self.files:
            stem = _composed(file.with_suffix(""))
            stems[stem] = (*stems.get(stem, ()), file)
        return stems

    def beside(self, text_file: Path) -> tuple[Path, ...]:
        """Returns the files to train on that a text file is about by its name, however accents are written."""
        return self.by_stem.get(_composed(text_file.with_suffix("")), ())

    def find(self, path: Path) -> Path | None:
        """Returns the file to train on of a name, however accents are written in it, or None.

        Tables that were written on Windows have backslashes between folders.
        """
        return self._by_path.get(_composed(path)) or self._by_path.get(_composed(Path(str(path).replace("\\", "/"))))

    def is_left_out(self, path: Path) -> bool:
        """Tells whether a name is that of a file which is there for something else."""
        return bool(self.left_out & {path, Path(str(path).replace("\\", "/"))})

    @cached_property
    def _by_path(self) -> dict[Path, Path]:
        return {_composed(file): file for file in self.files}


def _composed(path: Path) -> Path:
    """Returns a path whose accented letters are single characters; macOS writes letter and accent apart."""
    return Path(unicodedata.normalize("NFC", str(path)))


def named_in(folder: Path, name: str) -> Path:
    """Returns the file that a table names; those that were written on Windows have backslashes between folders."""
    path = folder / name
    # os.path, since pathlib raises where the name is too long
    return path if "\\" not in name or os.path.isfile(path) else folder / name.replace("\\", "/")  # noqa: PTH113


def list_folder(path: str, noun: str, endings: Sequence[str], setting: str = "data.path") -> Folder:
    """Returns the files of a folder and its subfolders, without hidden ones.

    Args:
        path: the folder, as the user gave it.
        noun: what messages call the files to train on.
        endings: how their names end, in small letters; any case is found.
        setting: where the user gave it, for messages.

    Raises:
        DataError: there is no such folder, no file to train on in it, or one whose name is not UTF-8.
    """
    root = user_path(path, setting)
    if not root.exists():
        raise DataError(f"{setting}={path}: there is no such folder (looked at {root.absolute()}); correct the path.")
    if not root.is_dir():
        raise DataError(f"{setting}={path} is a file; give the folder that holds the {noun}.")
    try:
        listed = list(_walk(root))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); correct its access rights.") from error
    odd = [os.fsencode(file.relative_to(root)) for file in listed if not is_text(str(file.relative_to(root)))]
    if odd:
        raise DataError(f"{setting}={path}: {len(odd)} file name(s) are not UTF-8; rename them.", [*map(repr, odd)])
    files = tuple(file for file in listed if file.suffix.lower() in endings)
    if not files:
        counts = Counter(file.suffix.lower() or "(no ending)" for file in listed).most_common(5)
        present = ", ".join(f"{count} {ending}" for ending, count in counts) or "nothing"
        raise DataError(
            f"{setting}={path} and its subfolders hold no {noun} ({', '.join(endings)}), but {present}; "
            f"give the folder with the {noun}, or convert them."
        )
    others = tuple(file for file in listed if file.suffix.lower() not in endings)
    return Folder(root, noun, files, others, f"{setting}={path}")


def _walk(root: Path) -> Iterator[Path]:
    """Yields all but folders in the order of their names, whatever links lead back; each folder is walked once."""
    seen = {_identity(root)}
    open_folders = [iter(sorted(root.iterdir()))]
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        elif not entry.is_dir():
            yield entry
        elif (identity := _identity(entry)) not in seen:
            seen.add(identity)
            open_folders.append(iter(sorted(entry.iterdir())))


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def read_text(folder: Folder, file: Path, errors: list[str], largest_bytes: int = LARGEST_TABLE_BYTES) -> str | None:
    """Returns the content of a UTF-8 file, or None and an error; what is larger than it can be is not read."""
    if file_type := not_a_file(file):
        errors.append(f"{folder.name(file)}: is {file_type} and no file; move it away.")
        return None
    try:
        num_bytes = file.stat().st_size
        if num_bytes > largest_bytes:
            errors.append(
                f"{folder.name(file)}: has {num_bytes:,} bytes, and at most {largest_bytes:,} are read; "
                "cut or split it, or move it away."
            )
            return None
        text = file.read_text(encoding="utf-8-sig")
        if "\0" not in text:
            return text
        errors.append(f"{folder.name(file)}: holds NUL characters, as UTF-16 does; save the file as UTF-8.")
    except UnicodeDecodeError as error:
        value, line = error.object[error.start], error.object.count(b"\n", 0, error.start) + 1
        errors.append(
            f"{folder.name(file)}: byte 0x{value:02x} at position {error.start} (line {line}) is not UTF-8; "
            "save the file as UTF-8."
        )
    except OSError as error:
        errors.append(f"{folder.name(file)}: cannot be read ({error.strerror}); correct its access rights or link.")
    return None


def stop(folder: Folder, texts: str, errors: Sequence[str], unreadable: int) -> None:
    """Ends the check.

    Args:
        folder: what was checked.
        texts: what belongs to the files, say "captions".
        errors: all that is wrong.
        unreadable: how many of them are files that `data.skip_bad` would leave out.

    Raises:
        DataError: there are errors; it lists all of them.
    """
    if errors:
        skip = f", or set data.skip_bad=true to leave out {folder.noun} that cannot be read" if unreadable else ""
        raise _refusal(folder, texts, errors, skip)


def stop_or_leave_out(folder: Folder, texts: str, errors: Sequence[str], num_left: int, *, skip_bad: bool) -> None:
    """Ends the check of samples of which each can be left out by itself.

    Args:
        folder: what was checked.
        texts: what belongs to the files, say "transcripts".
        errors: all that is wrong; each begins with the name of its sample and a colon.
        num_left: samples without an error.
        skip_bad: `data.skip_bad`: warn of the errors, as long as a sample is left.

    Raises:
        DataError: there are errors, and they shall not be left out; it lists all of them.
    """
    if not errors:
        return
    if not skip_bad or not num_left:
        skip = ", or set data.skip_bad=true to leave out what cannot be used" if num_left else ""
        raise _refusal(folder, texts, errors, skip)
    names = list(dict.fromkeys(error.partition(": ")[0] for error in errors))
    logger.warning(
        "Left out, since data.skip_bad=true: %d (%s); kept: %d. For example, %s",
        len(names),
        name_some(names),
        num_left,
        " ".join(errors[:_NUM_SHOWN]),
    )


def _refusal(folder: Folder, texts: str, errors: Sequence[str], skip: str) -> DataError:
    given = folder.given or f"data.path={folder.root}"
    errors_in = f"{len(errors)} errors in" if len(errors) > 1 else "1 error in"
    num = len(folder.files)
    return DataError(
        f"{given}: {errors_in} {num} {folder.noun} and {texts}; correct the files{skip}.",
        [shown(error, _LONGEST_ERROR) for error in errors],
    )


class Content(Protocol):
    """What has a file, or bytes in a table instead."""

    @property
    def path(self) -> Path:
        """The file; a name where there are bytes."""

    @property
    def read_bytes(self) -> Callable[[], bytes] | None:
        """Gives the bytes; None reads the file."""


def content_bytes(source: Content) -> bytes:
    """Returns the bytes of a sample's file."""
    return source.read_bytes() if source.read_bytes else source.path.read_bytes()


def content_digest(source: Content) -> str:
    """Returns the SHA-256 of the bytes of a sample's file."""
    return hashlib.sha256(source.read_bytes()).hexdigest() if source.read_bytes else content_hash(source.path)
