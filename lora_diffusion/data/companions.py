"""Images in a data folder that are there for something else than to be trained on, and are left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.data.captions import ENDINGS, METADATA
from lora_diffusion.data.folder import Folder


class _Reason(NamedTuple):
    noun: str
    advice: str


_ELSEWHERE = "to train on them, give their folder another name"
_REGULARISATION = _Reason(
    "regularisation images", f"they cannot be used yet, and are no images of the subject; {_ELSEWHERE}"
)
_CLASS = _Reason(
    "regularisation images",
    "their folder has the class of another one for its name, and none of their captions names that one's subject; to "
    "train on them, give it another name",
)
_OUTPUT = _Reason("images in folders in which trainers write", _ELSEWHERE)
_SAMPLES = _Reason("previews and samples of training runs", "move them to another folder to train on them")
_SIDE = _Reason(
    "masks, control images, previews and other companions of images",
    "they cannot be used yet; to train on them, give them captions of their own",
)
_OF_SYSTEM = _Reason("images in folders of the system", "they are copies or deleted")

_CLASS_FOLDER = re.compile(r"(\d+)_(.*)")
_REGULARISATION_FOLDER = re.compile(
    r"(?:\d+_)?(?:regs?|regulari[sz]ations?)(?:_\w+)?|\w+_(?:regs?|regulari[sz]ations?)(?:_(?:images?|imgs?|data|set))?"
    r"|(?:class|classification|prior|prior_preservation)_(?:images?|imgs?|pics?|pictures?|photos?|data|dataset|dir|set)"
    r"|\u6b63\u5219\w*"
)
"""Also in Chinese, the language of widespread forks of kohya's GUI."""
_IMAGES_FOLDER = re.compile(
    r"imgs?|images?|train(?:ing)?(?:_(?:data|images?|imgs?))?|instance_(?:images?|data)|dataset"
)
"""Beside them lie the other folders of a kohya project."""
_OUTPUT_FOLDER = re.compile(r"logs?|models?|outputs?|checkpoints?")
_SYSTEM_FOLDER = re.compile(r"@eadir|#recycle|\$recycle\.bin|system volume information|lost\+found")
_SIDE_NAMES = (
    "masks?|masklabels?|alpha|alphas|matte|mattes|depth|depths|depthmaps?|canny|edges?|hed|scribbles?|lineart|softedge|"
    "poses?|openpose|normals?|normalmaps?|seg|segs|segmentations?|control|controls|controlnet|cond|condlabels?|"
    "conditioning|thumbs?|thumbnails?|previews?|samples?"
)
_SIDE_FOLDER = re.compile(
    rf"(?:\w+_)?(?:{_SIDE_NAMES})(?:_(?:images?|imgs?|pictures?|data|maps?|labels?|dir|folder|set))?"
)
_SIDE_FILES = (
    re.compile(rf"(?P<stem>.+?)[-_. ](?:{_SIDE_NAMES})(?:[-_ ]?\d+)?", re.IGNORECASE),
    re.compile(rf"(?:{_SIDE_NAMES})[-_. ](?P<stem>.+)", re.IGNORECASE),
)
_ONETRAINER = re.compile(r".+-(?:masklabel|condlabel)", re.IGNORECASE)
_SAMPLE_FILE = re.compile(
    r"(?:.*_)?e?\d{6}_\d{2}_\d{14}(?:_\d+)?"  # sd-scripts, in sample_image_inference
    r"|\d{10,}__\d{9}_\d+"  # ai-toolkit
    r"|.*training-sample-\d+-\d+-\d+.*"  # OneTrainer
)
_LARGEST_TEXT_BYTES = 2**28
_RUN_FILES = {"config.yaml", "metrics.jsonl"}
"""Both lie in every run folder of ours."""


def leave_out(folder: Folder, setting: str = "data.path") -> Folder:
    """Returns the folder without companions and with no text file about them; one warning names each reason.

    Args:
        folder: images and what lies beside them.
        setting: where the user gave the folder, for messages.

    Raises:
        DataError: no image is left.
    """
    _warn_of_root(folder, setting)
    reasons = dict(_Layout(folder).reasons())
    groups: dict[_Reason, list[Path]] = defaultdict(list)
    for file, reason in reasons.items():
        groups[reason].append(file)
    if len(reasons) == len(folder.files):
        listed = "; ".join(f"{len(files)} {reason.noun} ({_places(folder, files)})" for reason, files in groups.items())
        raise DataError(
            f"{setting}={folder.root} holds no images to train on, but {listed}; give the folder of the images "
            "itself or another name to theirs."
        )
    for reason, files in groups.items():
        logger.warning("Left out %s: %d (%s): %s.", reason.noun, len(files), _places(folder, files), reason.advice)
    kept = tuple(file for file in folder.files if file not in reasons)
    stems = {file.with_suffix("") for file in kept}
    lone = {file.with_suffix("") for file in reasons} - stems
    places = {file.parent for file in reasons} - {parent for file in kept for parent in file.parents}
    others = (file for file in folder.others if file.with_suffix("") not in lone and file.parent not in places)
    return replace(folder, files=kept, others=tuple(others), left_out=folder.left_out | frozenset(reasons))


def _places(folder: Folder, files: Iterable[Path]) -> str:
    """Names the folders of files, or those that lie at the top by themselves."""
    names = (file.name if file.parent == folder.root else f"{folder.name(file.parent)}/" for file in files)
    return name_some(list(dict.fromkeys(names)))


def _warn_of_root(folder: Folder, setting: str) -> None:
    path = folder.root.absolute()
    named = [part.name for part in (path, path.parent) if _REGULARISATION_FOLDER.fullmatch(_normalised(part.name))]
    if named and (named[0] == path.name or _CLASS_FOLDER.fullmatch(path.name)):
        logger.warning(
            "%s=%s is named as folders of regularisation images are, and is trained on: give the folder of the "
            "subject's images if it was meant.",
            setting,
            folder.root,
        )


def _normalised(name: str) -> str:
    return re.sub(r"[-\s_]+", "_", name.strip().lower())


@dataclass(frozen=True)
class _Layout:
    """A folder, as far as names tell what is in it."""

    folder: Folder

    def reasons(self) -> Iterator[tuple[Path, _Reason]]:
        """Yields each image to be left out, and why."""
        for file in self.folder.files:
            parents = [*reversed(file.relative_to(self.folder.root).parents)][1:]
            by_folder = (self._of_folder(self.folder.root / parent) for parent in parents)
            reason = next(filter(None, by_folder), None) or self._of_file(file)
            if reason:
                yield file, reason

    def _of_folder(self, path: Path) -> _Reason | None:
        if path not in self._of_folders:
            self._of_folders[path] = self._find(path)
        return self._of_folders[path]

    @cached_property
    def _of_folders(self) -> dict[Path, _Reason | None]:
        return {}

    def _find(self, path: Path) -> _Reason | None:
        name = _normalised(path.name)
        if _SYSTEM_FOLDER.fullmatch(path.name.lower()):
            return _OF_SYSTEM
        if self._other_names.get(path, set()) >= _RUN_FILES:
            return _SAMPLES
        if _REGULARISATION_FOLDER.fullmatch(name):
            return _REGULARISATION
        if self._is_class_of_another(path):
            return _CLASS
        if _OUTPUT_FOLDER.fullmatch(name) and self._is_project(path.parent) and not self._is_described(path):
            return _OUTPUT
        if _SIDE_FOLDER.fullmatch(name) and not self._is_described(path) and self._has_main_images(path):
            return _SIDE
        return None

    def _of_file(self, file: Path) -> _Reason | None:
        if _ONETRAINER.fullmatch(file.stem):
            return _SIDE
        if _SAMPLE_FILE.fullmatch(file.stem) and not self._has_caption(file):
            return _SAMPLES
        is_beside = any(self.folder.beside(file.with_name(f"{stem}{ENDINGS[0]}")) for stem in _main_stems(file))
        return _SIDE if is_beside and not self._has_caption(file) else None

    def _is_class_of_another(self, path: Path) -> bool:
        """Tells whether there is a folder 10_sks dog for a folder 1_dog, and none of the latter's captions says sks."""
        words_of_class = _class_words(path)
        if not words_of_class:
            return False
        every = (_class_words(one) for folders in self._siblings.values() for one in folders)
        longer = [words for words in every if words[-len(words_of_class) :] == words_of_class]
        subjects = {word for words in longer for word in words[: -len(words_of_class)]}
        texts = (file for file in self.folder.others if path in file.parents and file.suffix.lower() in ENDINGS)
        return bool(subjects) and not any(subjects & set(re.findall(r"\w+", _read(file))) for file in texts)

    def _is_project(self, path: Path) -> bool:
        images = [one for one in self._siblings[path] if _IMAGES_FOLDER.fullmatch(_normalised(one.name))]
        return any(_CLASS_FOLDER.fullmatch(one.name) for image in images for one in self._siblings[image])

    def _is_described(self, path: Path) -> bool:
        """Tells whether images in a folder have captions, or class words in the name of theirs."""
        inside = [file for file in self.folder.files if path in file.parents]
        return any(self._has_caption(file) or _CLASS_FOLDER.fullmatch(file.parent.name) for file in inside)

    def _has_main_images(self, path: Path) -> bool:
        """Tells whether a folder's images are named as others are, or most others have captions."""
        inside = [file for file in self.folder.files if path in file.parents]
        outside = [file for file in self.folder.files if path.parent in file.parents and path not in file.parents]
        stems = {file.stem for file in outside}
        named = sum(bool({file.stem, *_main_stems(file)} & stems) for file in inside)
        return 2 * named >= len(inside) or 2 * sum(map(self._has_caption, outside)) > len(outside)

    def _has_caption(self, file: Path) -> bool:
        return file in self._captioned or file.name.casefold() in self._tables

    @cached_property
    def _captioned(self) -> frozenset[Path]:
        texts = (file for file in self.folder.others if file.suffix.lower() in ENDINGS)
        return frozenset(image for file in texts for image in self.folder.beside(file))

    @cached_property
    def _tables(self) -> str:
        """The texts of all tables that could name images."""
        return "\n".join(_read(file) for file in self.folder.others if file.stem == METADATA)

    @cached_property
    def _siblings(self) -> dict[Path, set[Path]]:
        """Folder -> the folders in it that hold images, at any depth."""
        folders: dict[Path, set[Path]] = defaultdict(set)
        for place in {file.parent for file in self.folder.files}:
            below = [place, *place.parents]
            for inner, outer in pairwise(below):
                folders[outer].add(inner)
                if outer == self.folder.root:
                    break
        return folders

    @cached_property
    def _other_names(self) -> dict[Path, set[str]]:
        names: dict[Path, set[str]] = defaultdict(set)
        for file in self.folder.others:
            names[file.parent].add(file.name)
        return names


def _class_words(path: Path) -> list[str]:
    match = _CLASS_FOLDER.fullmatch(path.name)
    return re.split(r"[\s_-]+", match[2].strip().casefold()) if match and match[2].strip() else []


def _main_stems(file: Path) -> list[str]:
    """Returns the names of the image that a file belongs to by its own name: cat for cat_mask and mask_cat."""
    return [match["stem"] for pattern in _SIDE_FILES if (match := pattern.fullmatch(file.stem))]


def _read(file: Path) -> str:
    """Returns the text of a file in small letters, "" where it is none or cannot be read, which is told elsewhere."""
    try:
        is_text = file.is_file() and file.stat().st_size <= _LARGEST_TEXT_BYTES
        return file.read_text(encoding="utf-8-sig", errors="replace").casefold() if is_text else ""
    except OSError:
        return ""
