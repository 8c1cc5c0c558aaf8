"""What holds the samples of a data set besides plain files: tables, saved data sets, Parquet files, splits."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import default_cache_path, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, suggestion
from lora_diffusion.data.folder import Folder, list_folder

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Ending of a table's name, in small letters -> what stands between its columns."""
AUTO_SPLIT, ALL_SPLITS = "auto", "all"
_TRAIN = "train"
_SPLIT_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
"""Files that hold many samples, so that their own name may be that of a split."""
_SPLIT_PIECES = r"([-_.](clean|other|set|split|data|of|\d+))*"
"""What may follow the name of a split, as in LibriSpeech's test-clean and in the pieces of a Parquet file."""
_HELD_OUT = re.compile(rf"(tests?|testing|val|valid|validation|dev|eval|evaluation|held[-_]?out){_SPLIT_PIECES}", re.I)
_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_PARQUET = ".parquet"
_ABOUT = (".md", ".txt", "")
"""Endings of what people write about a data set."""


def table_rows(folder: Folder, file: Path, text: str, errors: list[str]) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Yields the number of the last line of each row, and the row by the names in the header.

    What a row has beyond the header stands under the key None.

    Args:
        folder: holds the table.
        file: its name tells the delimiter.
        text: its content.
        errors: one line is added where it cannot be read any further.
    """
    reader = csv.DictReader(io.StringIO(text), delimiter=DELIMITERS[file.suffix.lower()])
    start = 1
    try:
        start += bool(reader.fieldnames)
        for row in reader:
            yield reader.line_num, row
            start = reader.line_num + 1
    except csv.Error as error:
        place = f"{folder.name(file)}, line {start}"
        errors.append(f"{place}: cannot be read ({error}); look for a quote without its pair.")


@dataclass(frozen=True)
class Rows:
    """A table, of which one column holds files."""

    root: Path
    """Where it lies, and where the names of files in it are looked up."""
    texts: Any
    """The other columns; `texts[index]` is a row as a dict."""
    files: tuple[tuple[Callable[[], bytes], ...], ...]
    """For each row what gives the content of its files; none where the cell is empty."""


def are_rows(path: str) -> bool:
    """Says whether `data.path` is such a data set."""
    root = user_path(path, "data.path")
    if root.is_file():
        return root.suffix.lower() == _PARQUET
    return any((root / name).is_file() for name in (_SAVED, _SAVED_SPLITS)) or any(
        not any(part.startswith(".") for part in file.relative_to(root).parts) for file in root.rglob(f"*{_PARQUET}")
    )


def read_rows(path: str, split: str, names: Sequence[str], feature: str, wanted: str) -> Rows:
    """Opens such a data set; files stay where they are until they are asked for.

    Args:
        path: `data.path`.
        split: `data.split`.
        names: what the column with the files may be called, best first.
        feature: Audio or Image.
        wanted: what it must hold, for messages, say "recordings".

    Raises:
        DataError: it cannot be read, has no such column, or no such split.
        UnsupportedError: the package datasets is not installed.
    """
    datasets = require("datasets", "Reading a saved data set or Parquet files")
    root = user_path(path, "data.path")
    try:
        table = _open(datasets, root, path, split)
        column = next((name for name in names if name in table.column_names), None)
        if column is None:
            raise DataError(
                f"data.path={path} has the columns {', '.join(table.column_names)}; the {wanted} must stand in one "
                f"named {', '.join(names[:-1])} or {names[-1]}."
            )
        is_list = isinstance(table.features[column], datasets.List | datasets.Sequence | list)
        one = getattr(datasets, feature)(decode=False)
        table = table.cast_column(column, datasets.List(one) if is_list else one)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(f"data.path={path} cannot be read as a table of {wanted} ({reason}); save it again.") from error
    folder = root.parent if root.is_file() else root
    counts = _num_files(table, column, is_list)
    files = tuple(
        tuple(partial(_content, table, index, column, place, folder) for place in range(count))
        for index, count in enumerate(counts)
    )
    return Rows(folder, table.remove_columns(column), files)


def _open(datasets: Any, root: Path, path: str, split: str) -> Any:
    given = f"data.path={path}"
    if (root / _SAVED_SPLITS).is_file():
        saved = datasets.load_from_disk(str(root))
        return datasets.concatenate_datasets([saved[name] for name in choose_split_names(list(saved), split, given)])
    if root.is_file() or (root / _SAVED).is_file():
        check_single_split(split, given)
    if (root / _SAVED).is_file():
        return datasets.load_from_disk(str(root))
    files = (root,) if root.is_file() else _parquet_files(path, split)
    datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(default_cache_path() / "parquet"))


def _parquet_files(path: str, split: str) -> tuple[Path, ...]:
    folder = choose_split(list_folder(path, "tables", (_PARQUET,)), split)
    others = [folder.name(file) for file in folder.others if file.suffix.lower() not in _ABOUT]
    if others:
        logger.warning(
            "%s: the Parquet files are read, and other files are not: %d (%s).",
            folder.given,
            len(others),
            name_some(others),
        )
    return folder.files


def _num_files(table: Any, column: str, is_list: bool) -> list[int]:
    import pyarrow.compute

    cells = table.flatten_indices().data.column(column)
    counted = pyarrow.compute.list_value_length(cells) if is_list else pyarrow.compute.is_valid(cells)
    return [int(count or 0) for count in counted.to_pylist()]


def _content(table: Any, index: int, column: str, place: int, root: Path) -> bytes:
    """Returns the bytes of a file.

    Raises:
        OSError: the row names a file that cannot be read.
    """
    cell = table[index][column]
    cell = cell[place] if isinstance(cell, list) else cell
    if cell["bytes"] is not None:
        return bytes(cell["bytes"])
    if not cell["path"]:
        raise FileNotFoundError(2, "its cell is empty")
    return Path(root / cell["path"]).read_bytes()


def is_held_out(name: str) -> bool:
    """Says whether a folder, a table or a split of this name is usually kept to test with.

    >>> [is_held_out(name) for name in ("test", "dev-clean", "validation-00000-of-00002", "train", "testimony")]
    [True, True, True, False, False]
    """
    return bool(_HELD_OUT.fullmatch(name))


def is_of_split(name: str, split: str) -> bool:
    """Says whether a folder, a table or a split is what `data.split` names, or a piece of it.

    >>> [is_of_split(name, "test") for name in ("test", "test-clean", "test-00000-of-00002", "latest")]
    [True, True, True, False]
    """
    return bool(re.fullmatch(re.escape(split) + _SPLIT_PIECES, name))


def choose_split_names(names: Sequence[str], split: str, given: str) -> list[str]:
    """Returns those of the splits of a saved data set that are trained on, and says which are not.

    Args:
        names: all of them.
        split: `data.split`.
        given: what holds them, for messages, say "data.path=saved".

    Raises:
        DataError: none is left.
    """
    if split == ALL_SPLITS:
        return list(names)
    wanted = [name for name in names if is_of_split(name, _TRAIN if split == AUTO_SPLIT else split)]
    if split == AUTO_SPLIT and not wanted:
        wanted = [name for name in names if not is_held_out(name)]
    if not wanted:
        raise _no_split_left(names, split, given)
    if left_out := [name for name in names if name not in wanted]:
        _warn_of_left_out(", ".join(left_out), given)
    return wanted


def choose_split(folder: Folder, split: str) -> Folder:
    """Returns a folder without the files of splits that are not asked for, and says which they are.

    The split of a file is a folder above it, below the root, or the name of a table: test/a.wav, dev-clean/84/a.flac,
    test.jsonl.

    Args:
        folder: all files.
        split: `data.split`: auto leaves out what is usually kept to test with, all nothing; else the name of one.

    Raises:
        DataError: nothing to train on is left.
    """
    if split == ALL_SPLITS:
        return folder
    # Recordings of one folder may belong to several splits, each with a table of its own.
    has_table = any(is_of_split(file.stem, split) for file in folder.others if file.suffix.lower() in _SPLIT_TABLES)

    def is_chosen(file: Path) -> bool:
        names = _split_names(folder, file)
        if split == AUTO_SPLIT:
            return not any(map(is_held_out, names))
        return any(is_of_split(name, split) for name in names) or (
            has_table and file.suffix.lower() not in _SPLIT_TABLES
        )

    files, others = (tuple(filter(is_chosen, listed)) for listed in (folder.files, folder.others))
    every = (*folder.files, *folder.others)
    if not files:
        raise _no_split_left(list({name for file in every for name in _split_names(folder, file)}), split, folder.given)
    left_out = sorted({*every} - {*files, *others})
    if left_out:
        counts = Counter(next(filter(is_held_out, _split_names(folder, file)), "others") for file in left_out)
        _warn_of_left_out(", ".join(f"{name} ({count} files)" for name, count in counts.items()), folder.given)
    return replace(folder, files=files, others=others, left_out=folder.left_out | frozenset(left_out))


def check_single_split(split: str, given: str) -> None:
    """Checks that no split is asked of what has none.

    Raises:
        DataError: one is.
    """
    if split not in (AUTO_SPLIT, ALL_SPLITS):
        raise DataError(f"data.split={split}: {given} has no splits; drop it, or give the folder with all of them.")


def _split_names(folder: Folder, file: Path) -> Iterable[str]:
    inner = file.relative_to(folder.root)
    return (*inner.parts[:-1], inner.stem) if file.suffix.lower() in _SPLIT_TABLES else inner.parts[:-1]


def _warn_of_left_out(left_out: str, given: str) -> None:
    logger.warning(
        "%s: left out what belongs to other splits: %s. Set data.split to the name of one, or to all, to take them.",
        given,
        left_out,
    )


def _no_split_left(names: Sequence[str], split: str, given: str) -> DataError:
    held_out = sorted(filter(is_held_out, names)) if split == AUTO_SPLIT else sorted(names)
    if split == AUTO_SPLIT:
        return DataError(
            f"{given} holds only splits that are usually kept to test with ({name_some(held_out)}); set data.split to "
            "the name of one, or to all, if they shall be taken."
        )
    there = f"; there is {name_some(held_out, 10)}" if held_out else ""
    return DataError(
        f"data.split={split}: {given} has no split of this name{suggestion(split, names)}{there}. Set data.split to "
        "one that is there, or to all."
    )
