"""Splits of a data set: those that are trained on, and those that are kept to test with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, suggestion
from lora_diffusion.data.folder import Folder

AUTO, ALL = "auto", "all"
_TRAIN = "train"
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Files that hold many samples, so that their own name may be that of a split."""
_PIECES = r"([-_.](clean|other|set|split|data|of|\d+))*"
"""What may follow the name of a split, as in LibriSpeech's test-clean and in the pieces of a Parquet file."""
_HELD_OUT = re.compile(rf"(tests?|testing|val|valid|validation|dev|eval|evaluation|held[-_]?out){_PIECES}", re.I)


def is_held_out(name: str) -> bool:
    """Says whether a folder, a table or a split of this name is usually kept to test with.

    >>> [is_held_out(name) for name in ("test", "dev-clean", "validation-00000-of-00002", "train", "testimony")]
    [True, True, True, False, False]
    """
    return bool(_HELD_OUT.fullmatch(name))


def is_named(name: str, split: str) -> bool:
    """Says whether a folder, a table or a split is what `data.split` names, or a piece of it.

    >>> [is_named(name, "test") for name in ("test", "test-clean", "test-00000-of-00002", "latest")]
    [True, True, True, False]
    """
    return bool(re.fullmatch(re.escape(split) + _PIECES, name))


def choose_names(names: Sequence[str], split: str, given: str) -> list[str]:
    """Returns those of the splits of a saved data set that are trained on, and says which are not.

    Args:
        names: all of them.
        split: `data.split`.
        given: what holds them, for messages, say "data.path=saved".

    Raises:
        DataError: none is left.
    """
    if split == ALL:
        return list(names)
    wanted = [name for name in names if is_named(name, _TRAIN if split == AUTO else split)]
    if split == AUTO and not wanted:
        wanted = [name for name in names if not is_held_out(name)]
    if not wanted:
        raise _none_left(names, split, given)
    if left_out := [name for name in names if name not in wanted]:
        _tell(", ".join(left_out), given)
    return wanted


def choose(folder: Folder, split: str) -> Folder:
    """Returns a folder without the files of splits that are not asked for, and says which they are.

    The split of a file is a folder above it, below the root, or the name of a table: test/a.wav, dev-clean/84/a.flac,
    test.jsonl.

    Args:
        folder: all files.
        split: `data.split`: auto leaves out what is usually kept to test with, all nothing; else the name of one.

    Raises:
        DataError: nothing to train on is left.
    """
    if split == ALL:
        return folder
    # Recordings of one folder may belong to several splits, each with a table of its own.
    has_table = any(is_named(file.stem, split) for file in folder.others if file.suffix.lower() in _TABLES)

    def is_chosen(file: Path) -> bool:
        names = _names(folder, file)
        if split == AUTO:
            return not any(map(is_held_out, names))
        return any(is_named(name, split) for name in names) or (has_table and file.suffix.lower() not in _TABLES)

    files, others = (tuple(filter(is_chosen, found)) for found in (folder.files, folder.others))
    every = (*folder.files, *folder.others)
    if not files:
        raise _none_left(list({name for file in every for name in _names(folder, file)}), split, folder.given)
    left_out = sorted({*every} - {*files, *others})
    if left_out:
        counts = Counter(next(filter(is_held_out, _names(folder, file)), "others") for file in left_out)
        _tell(", ".join(f"{name} ({count} files)" for name, count in counts.items()), folder.given)
    return replace(folder, files=files, others=others, left_out=folder.left_out | frozenset(left_out))


def check_single(split: str, given: str) -> None:
    """Checks that no split is asked of what has none.

    Raises:
        DataError: one is.
    """
    if split not in (AUTO, ALL):
        raise DataError(f"data.split={split}: {given} has no splits; drop it, or give the folder with all of them.")


def _names(folder: Folder, file: Path) -> Iterable[str]:
    inner = file.relative_to(folder.root)
    return (*inner.parts[:-1], inner.stem) if file.suffix.lower() in _TABLES else inner.parts[:-1]


def _tell(left_out: str, given: str) -> None:
    logger.warning(
        "%s: left out what belongs to other splits: %s. Set data.split to the name of one, or to all, to take them.",
        given,
        left_out,
    )


def _none_left(names: Sequence[str], split: str, given: str) -> DataError:
    held_out = sorted(filter(is_held_out, names)) if split == AUTO else sorted(names)
    if split == AUTO:
        return DataError(
            f"{given} holds only splits that are usually kept to test with ({name_some(held_out)}); set data.split to "
            "the name of one, or to all, if they shall be taken."
        )
    there = f"; there is {name_some(held_out, 10)}" if held_out else ""
    return DataError(
        f"data.split={split}: {given} has no split of this name{suggestion(split, names)}{there}. Set data.split to "
        "one that is there, or to all."
    )
