"""Which format a file is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_diffusion.compat.identify import refuse_other
from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.peft import headers
from lora_diffusion.formats.tensor_names import EMBEDDING, refuse_unread


def detect(path: Path) -> str:
    """Returns the name of the format of an adapter file or folder, decided by the names of its tensors.

    Raises:
        AdapterFileError: no format, or two at once.
        UnsupportedError: it is for a kind of base that is not known; or no format, and a kind of adapter that is not
            read.
    """
    refuse_other(path)
    names = [name for header in headers(path) for name in header.tensors]
    found = formats_of(names)
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterFileError(f"{path} mixes the spellings of {' and '.join(found)}; no program reads all of it.")
    if not names:
        raise AdapterFileError(f"{path} holds no tensors; get the file again.")
    refuse_unread(names, path)
    raise AdapterFileError(
        f"{path} is not an adapter in a known format ({', '.join(registry.available('formats'))}). Its first tensors:",
        names[:5],
    )


def is_adapter(path: Path) -> bool:
    """Says whether a whole file or folder holds tensors of an adapter, in whatever spelling."""
    try:
        return bool(formats_of([name for header in headers(path) for name in header.tensors]))
    except AdapterFileError:
        return False


def stored_dtypes(path: Path) -> set[str]:
    """Returns the number types of the matrices of an adapter file or folder, as safetensors spells them: F16, ..."""
    return {
        info.dtype
        for header in headers(path)
        for name, info in header.tensors.items()
        if len(info.shape) > 1 and not name.startswith(EMBEDDING)
    }


def formats_of(names: Sequence[str]) -> list[str]:
    """Returns every format that recognises some of the names."""
    return [name for name in registry.available("formats") if registry.find("formats", name).detect(names)]
