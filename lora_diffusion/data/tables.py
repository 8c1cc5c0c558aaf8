"""Tables with a header: metadata.csv and metadata.tsv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_diffusion.data.folder import Folder

DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Ending of a table's name, in small letters -> what stands between its columns."""


def rows(folder: Folder, file: Path, text: str, faults: list[str]) -> Iterator[tuple[int, dict[str | None, Any]]]:
    """Yields the number of the last line of each row, and the row by the names in the header.

    What a row has beyond the header stands under the key None.

    Args:
        folder: holds the table.
        file: its name tells the delimiter.
        text: its content.
        faults: one line is added where it cannot be read any further.
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
        faults.append(f"{place}: cannot be read ({error}); look for a quote without its pair.")
