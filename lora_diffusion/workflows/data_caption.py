"""Captions for a training folder, written by a base of visual question answering."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.files import check_writable, write_text
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.data import captions, chats, preflight
from lora_diffusion.data.folder import Folder
from lora_diffusion.workflows.ask import Adapters, Answerer

_AT_ONCE = 16
_PLACEHOLDERS = ("name", "folder")


@dataclass(frozen=True)
class Captions:
    """What the captioner did in a folder."""

    written: dict[Path, str]
    """Caption file -> its text."""
    kept: tuple[Path, ...]
    """Images that had a caption."""
    silent: tuple[Path, ...]
    """Images about which the model said nothing."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "written": {str(path): text for path, text in self.written.items()},
            "kept": [str(path) for path in self.kept],
            "silent": [str(path) for path in self.silent],
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"{path}: {text}" for path, text in self.written.items()]
        lines.append(f"Wrote {len(self.written)} captions; {len(self.kept)} images had one and keep it.")
        if self.silent:
            lines.append(f"Without an answer, not written: {name_some([str(path) for path in self.silent], 10)}.")
        return "\n".join(lines)


def caption(
    folder_path: str,
    model: ModelOptions,
    *,
    adapters: Adapters = (),
    prompt: str = "Describe the picture.",
    trigger: str = "",
    ending: str = ".txt",
    overwrite: bool = False,
) -> Captions:
    """Writes a caption beside each image that has none, batch by batch, so that a stop loses one batch at most.

    A caption file that is empty is filled, whatever its ending.

    Args:
        folder_path: images, in subfolders too.
        model: a base of visual question answering.
        adapters: files or folders with their weights; all are applied at once.
        prompt: the question; {name} stands for the file's name in words, {folder} for that of its folder.
        trigger: words put before each caption that does not hold them.
        ending: of new caption files, one of `data.captions.ENDINGS`.
        overwrite: replace captions of that ending.

    Raises:
        InputError: the base, an adapter, the prompt or an image cannot be used; nothing was written then.
    """
    _check_words(prompt, ending)
    answerer = Answerer(model, adapters)
    folder = preflight.list_images(folder_path, "FOLDER")
    check_writable(folder.root, "FOLDER")
    errors: list[str] = []
    existing = captions.collect(folder, errors)
    has_caption = {path for path, lines in existing.items() if lines is None or lines}
    wanted = [path for path in folder.files if overwrite or path not in has_caption]
    beside = _beside(folder)
    files = {path: _caption_file(path, beside, path in has_caption, ending) for path in wanted}
    errors += _conflicts(folder, files, beside, existing)
    preflight.measure(folder, False, errors)
    if errors:
        raise DataError(f"{folder.root}: nothing was captioned; correct the folder.", errors)
    written: dict[Path, str] = {}
    silent: list[Path] = []
    for start in range(0, len(wanted), _AT_ONCE):
        batch = wanted[start : start + _AT_ONCE]
        requests = [chats.ask(path, _filled(prompt, path)) for path in batch]
        for path, answer in zip(batch, answerer.answer(requests), strict=True):
            file = files[path]
            if not answer:
                silent.append(path)
            elif overwrite or _is_free(file):
                written[file] = _with_trigger(answer, trigger)
                write_text(file, written[file] + "\n")
        logger.info("Captioned %d of %d images.", min(start + _AT_ONCE, len(wanted)), len(wanted))
    return Captions(written, tuple(path for path in folder.files if path not in wanted), tuple(silent))


def _check_words(prompt: str, ending: str) -> None:
    try:
        fields = [
            f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            for _, name, form, conversion in string.Formatter().parse(prompt)
            if name is not None
        ]
    except ValueError as error:
        raise ConfigError(f"--prompt {prompt!r} has a brace without its pair ({error}); write {{{{ for one.") from error
    if unknown := [field for field in fields if field not in _PLACEHOLDERS]:
        known = " and ".join(f"{{{name}}}" for name in _PLACEHOLDERS)
        raise ConfigError(f"--prompt {prompt!r} holds {{{unknown[0]}}}; it may hold {known}.")
    if ending not in captions.ENDINGS:
        raise ConfigError(
            f"--ending {ending}: captions are read from files that end in {' or '.join(captions.ENDINGS)}."
        )


def _beside(folder: Folder) -> dict[Path, list[Path]]:
    """Returns the caption files by their path without ending."""
    files: dict[Path, list[Path]] = {}
    for file in folder.others:
        if file.suffix.lower() in captions.ENDINGS:
            files.setdefault(file.with_suffix(""), []).append(file)
    return files


def _caption_file(path: Path, beside: Mapping[Path, Sequence[Path]], has_caption: bool, ending: str) -> Path:
    """Returns where the caption of an image goes: into the file that waits for it, else into one of that ending."""
    new = path.with_suffix(ending)
    there = beside.get(path.with_suffix(""), [new])
    return new if has_caption or new in there else there[0]


def _is_free(file: Path) -> bool:
    """Says whether there is no caption in a file, which somebody may have written in the meantime."""
    return not file.exists() or not file.read_text(encoding="utf-8-sig", errors="replace").strip()


def _conflicts(
    folder: Folder, files: Mapping[Path, Path], beside: Mapping[Path, Sequence[Path]], existing: Mapping[Path, Any]
) -> list[str]:
    """Returns an error for each image whose new caption would stand beside another one."""
    twins = [group for group in folder.by_stem.values() if len(group) > 1 and set(group) & files.keys()]
    errors = [f"{' and '.join(map(folder.name, group))} would share a caption file; rename one." for group in twins]
    return errors + [
        f"{folder.name(path)}: its caption is not in {file.name} alone; remove the other one first."
        for path, file in files.items()
        if path in existing and beside.get(path.with_suffix("")) != [file]
    ]


def _filled(prompt: str, path: Path) -> str:
    words = {"name": path.stem, "folder": path.parent.name}
    return prompt.format(**{key: value.replace("-", " ").replace("_", " ") for key, value in words.items()})


def _with_trigger(text: str, trigger: str) -> str:
    return text if not trigger or captions.phrase_pattern(trigger).search(text) else f"{trigger}, {text}"
