"""Looks at a folder of images or recordings before anything else starts, and finds all that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.data import audio, companions, images
from lora_diffusion.data.folder import Folder, list_folder
from lora_diffusion.runtime.progress import watch

_OTHER_IMAGES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpf", ".svg", ".psd", ".xcf", ".tga", ".ico", ".exr", ".hdr"),
    *(".ppm", ".pgm", ".pnm", ".qoi", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".raw"),
)
_OTHER_RECORDINGS = (".wma", ".amr", ".ac3", ".ape", ".wv", ".avi", ".3gp", ".3gpp", ".ra", ".dsf", ".mid")
_OTHER_CAPTIONS = (".txt", ".caption", ".cap", ".captions", ".text", ".tag", ".tags", ".prompt", ".json", ".md")
_NUM_THREADS = 8


def list_images(path: str, setting: str = "data.path") -> Folder:
    """Returns the images of a folder and its subfolders that are to be trained on.

    Warns of those that are there for something else, and of names that mean trouble.

    Args:
        path: the folder, as the user gave it.
        setting: where the user gave it, for messages.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    folder = companions.leave_out(list_folder(path, "images", images.ENDINGS, setting))
    _warn_of_names(folder, _OTHER_IMAGES, "png", "caption")
    return folder


def find_images(path: str, setting: str) -> list[Path]:
    """Returns the images of a folder and its subfolders, all of which can be read.

    Args:
        path: the folder, as the user gave it.
        setting: where the user gave it, for messages.

    Raises:
        DataError: there is no such folder, no image in it, or some that cannot be read, which are all listed.
    """
    folder = companions.leave_out(list_folder(path, "images", images.ENDINGS, setting), setting)
    errors: list[str] = []
    measure(folder, False, errors)
    if errors:
        num = len(folder.files)
        raise DataError(f"{setting}={path}: {len(errors)} of {num} images cannot be read; correct them.", errors)
    return list(folder.files)


def list_recordings(path: str, setting: str = "data.path") -> Folder:
    """Returns the files of a folder of recordings and its subfolders, and warns of names that mean trouble.

    Args:
        path: the folder, as the user gave it.
        setting: where the user gave it, for messages.

    Raises:
        DataError: there is no such folder, or no recording in it.
    """
    folder = list_folder(path, "recordings", audio.ENDINGS, setting)
    _warn_of_names(folder, _OTHER_RECORDINGS, "wav or flac", "transcript")
    return folder


def _warn_of_names(folder: Folder, other_endings: Sequence[str], target: str, text: str) -> None:
    unread = [folder.name(file) for file in folder.others if file.suffix.lower() in other_endings]
    if unread:
        logger.warning(
            "Left out %s of a format that is not read: %d (%s). Convert them to %s to use them.",
            folder.noun,
            len(unread),
            name_some(unread),
            target,
        )
    twins = [" and ".join(map(folder.name, group)) for group in folder.by_stem.values() if len(group) > 1]
    if twins:
        logger.warning(
            "%s that share a name, and with it a %s file: %d (%s).",
            folder.noun.capitalize(),
            text,
            len(twins),
            name_some(twins),
        )


def measure(folder: Folder, skip_bad: bool, errors: list[str]) -> dict[Path, tuple[int, int]]:
    """Decodes every image in full and returns the width and height of those that can be read.

    Args:
        folder: the files.
        skip_bad: warn of the others instead of adding errors, as long as one image is left.
        errors: one line is added for each image that cannot be read.
    """
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        results = list(watch(pool.map(_measure, folder.files), len(folder.files), "Checking images"))
    pairs = list(zip(folder.files, results, strict=True))
    sizes = {path: result for path, result in pairs if not isinstance(result, str)}
    bad = {folder.name(path): result for path, result in pairs if isinstance(result, str)}
    if bad and skip_bad and sizes:
        logger.warning("Left out images that cannot be read: %d (%s).", len(bad), name_some(list(bad)))
    else:
        errors.extend(f"{name}: {reason}" for name, reason in bad.items())
    return sizes


def _measure(path: Path) -> tuple[int, int] | str:
    try:
        return images.measure(path)
    except images.ImageError as error:
        return error.reason


def add_missing_captions(folder: Folder, missing: Sequence[Path], num_images: int, errors: list[str]) -> None:
    """Adds an error for each image without a caption, or a single one if no image has any.

    Files that look like an image's caption but have another name are pointed out.
    """
    texts = {file.with_suffix(""): file for file in folder.others if file.suffix.lower() in _OTHER_CAPTIONS}
    guesses = {path: texts.get(path.with_suffix("")) or texts.get(path) for path in missing}
    if len(missing) < num_images:
        for path, guess in guesses.items():
            hint = f"rename {folder.name(guess)} to" if guess else "write"
            errors.append(f"{folder.name(path)}: has no caption; {hint} {path.stem}.txt beside it.")
        return
    close = [folder.name(guess) for guess in guesses.values() if guess]
    advice = f"these look like captions, rename them: {name_some(close)}" if close else "write them"
    errors.append(
        f"None of the {num_images} images has a caption (name.txt or name.caption beside name.png, or a "
        f"metadata.jsonl or metadata.csv); {advice}, or set data.captions=optional."
    )


def warn_of_orphans(folder: Folder, text: str, endings: Sequence[str]) -> None:
    """Warns once of text files that have no image or recording.

    Args:
        folder: the files.
        text: what the message calls what is in them, say "caption".
        endings: of their names, in small letters.
    """
    texts = [file for file in folder.others if file.suffix.lower() in endings]
    orphans = [folder.name(file) for file in texts if not folder.beside(file)]
    if orphans:
        logger.warning(
            "%s files that belong to none of the %s, not used: %d (%s).",
            text.capitalize(),
            folder.noun,
            len(orphans),
            name_some(orphans),
        )
