"""Data sets of rows: what `save_to_disk` of datasets wrote, with splits or without, and Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.extras import require
from lora_diffusion.core.files import default_cache_path, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some
from lora_diffusion.data import splits
from lora_diffusion.data.folder import list_folder

_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_PARQUET = ".parquet"
_ABOUT = (".md", ".txt", "")
"""Endings of what people write about a data set."""


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


def read(path: str, split: str, names: Sequence[str], feature: str, wanted: str) -> Rows:
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
        return datasets.concatenate_datasets([saved[name] for name in splits.choose_names(list(saved), split, given)])
    if root.is_file() or (root / _SAVED).is_file():
        splits.check_single(split, given)
    if (root / _SAVED).is_file():
        return datasets.load_from_disk(str(root))
    files = (root,) if root.is_file() else _parquet_files(path, split)
    datasets.disable_progress_bars()
    return datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(default_cache_path() / "parquet"))


def _parquet_files(path: str, split: str) -> tuple[Path, ...]:
    folder = splits.choose(list_folder(path, "tables", (_PARQUET,)), split)
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
    return (root / cell["path"]).read_bytes()
