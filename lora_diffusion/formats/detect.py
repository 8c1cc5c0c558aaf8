"""Which format a file is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.parsed_file import ParsedFile, parse_file
from lora_diffusion.formats.tensor_names import refuse_unread


def detect(file: ParsedFile) -> str:
    """Returns the name of the format of an adapter file or folder, decided by the names of its tensors.

    Raises:
        AdapterFileError: no format, or two at once.
        UnsupportedError: no format, and a variant that is not read.
    """
    file.check_record()
    formats = formats_of(file.names)
    if len(formats) == 1:
        return formats[0]
    if formats:
        raise AdapterFileError(f"{file.path} mixes the formats {' and '.join(formats)}; no program reads all of it.")
    if not file.names:
        raise AdapterFileError(f"{file.path} holds no tensors; get the file again.")
    refuse_unread(file.names, file.path)
    raise AdapterFileError(
        f"{file.path} is not an adapter in a known format ({', '.join(registry.available('formats'))}). Its first "
        "tensors:",
        file.names[:5],
    )


def is_adapter(path: Path) -> bool:
    """Says whether a whole file or folder holds tensors of an adapter, in whatever format."""
    try:
        file = parse_file(path)
        file.check_record()
    except AdapterFileError:
        return False
    return bool(formats_of(file.names))


def formats_of(names: Sequence[str]) -> list[str]:
    """Returns every format that recognises some of the names."""
    return [name for name in registry.available("formats") if registry.find("formats", name).detect(names)]
