"""Looks at a data folder before anything else starts, and says all that is wrong with it at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger, name_some
from lora_diffusion.data import images
from lora_diffusion.data._progress import watch

_OTHER_PICTURES = (".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jfif", ".svg", ".psd", ".dng")
_OTHER_CAPTIONS = (".txt", ".caption", ".cap", ".captions", ".text", ".tag", ".tags", ".prompt", ".json", ".md")
_NUM_THREADS = 8


@dataclass(frozen=True)
class Folder:
    """The files of a data set, sorted; nothing in it is ever changed."""

    root: Path
    pictures: tuple[Path, ...]
    others: tuple[Path, ...]

    def name(self, path: Path) -> str:
        """Returns a path as the user knows it: below the folder, with forward slashes."""
        return path.relative_to(self.root).as_posix()

    @cached_property
    def by_stem(self) -> dict[Path, tuple[Path, ...]]:
        """The pictures by their path without ending."""
        stems: dict[Path, tuple[Path, ...]] = {}
        for picture in self.pictures:
            stem = picture.with_suffix("")
            stems[stem] = (*stems.get(stem, ()), picture)
        return stems


def list_folder(path: str) -> Folder:
    """Returns the files of a folder and its subfolders, without hidden ones.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"data.path={path}: there is no such folder (looked at {root.absolute()}); correct the path.")
    if not root.is_dir():
        raise DataError(f"data.path={path} is a file; give the folder that holds the pictures.")
    try:
        files = list(_walk(root, {root.resolve()}))
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); correct its access rights.") from error
    pictures = tuple(file for file in files if file.suffix.lower() in images.ENDINGS)
    folder = Folder(root, pictures, tuple(file for file in files if file.suffix.lower() not in images.ENDINGS))
    if not pictures:
        endings = Counter(file.suffix.lower() or "(no ending)" for file in files).most_common(5)
        present = ", ".join(f"{count} {ending}" for ending, count in endings) or "nothing"
        raise DataError(
            f"data.path={path} and its subfolders hold no pictures ({', '.join(images.ENDINGS)}), but {present}; "
            "give the folder with the pictures, or convert them."
        )
    _warn_of_names(folder)
    return folder


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            continue
        if not entry.is_dir():
            yield entry
        elif (target := entry.resolve()) not in seen:
            seen.add(target)
            yield from _walk(entry, seen)


def _warn_of_names(folder: Folder) -> None:
    unread = [folder.name(file) for file in folder.others if file.suffix.lower() in _OTHER_PICTURES]
    if unread:
        logger.warning(
            "Left out pictures of a kind that is not read: %d (%s). Convert them to png to use them.",
            len(unread),
            name_some(unread),
        )
    twins = [" and ".join(map(folder.name, group)) for group in folder.by_stem.values() if len(group) > 1]
    if twins:
        logger.warning("Pictures that share a name, and with it a caption file: %d (%s).", len(twins), name_some(twins))


def measure(folder: Folder, skip_bad: bool, faults: list[str]) -> dict[Path, tuple[int, int]]:
    """Decodes every picture in full and returns the width and height of those that can be read.

    Args:
        folder: the files.
        skip_bad: warn of the others instead of adding faults, as long as one picture is left.
        faults: one line is added for each picture that cannot be read.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = list(watch(pool.map(_measure, folder.pictures), len(folder.pictures), "Checking pictures"))
    pairs = list(zip(folder.pictures, results, strict=True))
    sizes = {path: result for path, result in pairs if not isinstance(result, str)}
    bad = {folder.name(path): result for path, result in pairs if isinstance(result, str)}
    if bad and skip_bad and sizes:
        logger.warning("Left out pictures that cannot be read: %d (%s).", len(bad), name_some(list(bad)))
    else:
        faults.extend(f"{name}: {reason}" for name, reason in bad.items())
    return sizes


def _measure(path: Path) -> tuple[int, int] | str:
    try:
        return images.open_rgb(path).size
    except images.PictureError as error:
        return error.reason


def add_missing_captions(folder: Folder, missing: Sequence[Path], num_pictures: int, faults: list[str]) -> None:
    """Adds a fault for each picture without a caption, or a single one if no picture has any.

    Files that look like a picture's caption but have another name are pointed out.
    """
    texts = {file.with_suffix(""): file for file in folder.others if file.suffix.lower() in _OTHER_CAPTIONS}
    guesses = {path: texts.get(path.with_suffix("")) or texts.get(path) for path in missing}
    if len(missing) < num_pictures:
        for path, guess in guesses.items():
            hint = f"rename {folder.name(guess)} to" if guess else "write"
            faults.append(f"{folder.name(path)}: has no caption; {hint} {path.stem}.txt beside it.")
        return
    close = [folder.name(guess) for guess in guesses.values() if guess]
    advice = f"these look like captions, rename them: {name_some(close)}" if close else "write them"
    faults.append(
        f"None of the {num_pictures} pictures has a caption (name.txt or name.caption beside name.png, or a "
        f"metadata.jsonl); {advice}, or set data.captions=optional."
    )


def warn_of_orphans(folder: Folder, endings: Sequence[str]) -> None:
    """Warns once of caption files that have no picture."""
    captions = [file for file in folder.others if file.suffix.lower() in endings]
    orphans = [folder.name(file) for file in captions if file.with_suffix("") not in folder.by_stem]
    if orphans:
        logger.warning("Caption files without a picture, not used: %d (%s).", len(orphans), name_some(orphans))


def stop(folder: Folder, faults: Sequence[str], unreadable: int) -> None:
    """Ends the check.

    Raises:
        DataError: there are faults; it lists all of them.
    """
    if not faults:
        return
    skip = ", or set data.skip_bad=true to leave out pictures that cannot be read" if unreadable else ""
    faults_of = f"{len(faults)} faults in" if len(faults) > 1 else "1 fault in"
    raise DataError(
        f"data.path={folder.root}: {faults_of} {len(folder.pictures)} pictures and captions; correct the files{skip}.",
        faults,
    )
