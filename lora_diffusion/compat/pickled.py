"""Takes the tensors out of a pickle without running what its author put there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.formats.parsed_file import CONFIG, PICKLE, TENSORS, part_folders
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import as_array

if TYPE_CHECKING:
    from torch import Tensor

_DEEPEST = 16


def load_pickle(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a pickle, in any shape, by name; tables in tables give names joined by ".".

    torch's restricted reader (`weights_only=True`) builds tensors and plain values only. A table that holds nothing but
    one other table, such as {"state_dict": ...}, is a wrapper and adds no name.

    Raises:
        AdapterFileError: it is no pickle of torch, or holds anything but tables of plain tensors.
    """
    import torch

    if not path.is_file():
        raise AdapterFileError(f"There is no file {path}.")
    _refuse_compressed(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AdapterFileError(
            f"{path} cannot be read without trusting it ({reason}); ask for a .safetensors file."
        ) from error
    while isinstance(content, Mapping) and len(content) == 1 and isinstance(next(iter(content.values())), Mapping):
        content = next(iter(content.values()))
    tensors: dict[str, Tensor] = {}
    for name, value in _leaves(content, "", 0, path):
        if name in tensors:
            raise AdapterFileError(f"{path} names {name!r} twice; it cannot be converted.")
        tensors[name] = _plain(value, name, path)
    if not tensors:
        raise AdapterFileError(f"{path} holds no tensors.")
    return tensors


@contextmanager
def as_safetensors(path: Path) -> Iterator[Path]:
    """Yields a copy with the tensors of a pickle as safetensors, for all that reads adapters; it is then deleted.

    Args:
        path: a pickle, or a folder of PEFT that holds some.

    Raises:
        AdapterFileError: see `load_pickle`; or the folder holds none.
    """
    with TemporaryDirectory() as folder:
        copy = Path(folder) / (path.name or "adapter")
        if path.is_dir():
            _copy_folder(path, copy)
        else:
            copy = copy.with_suffix(".safetensors")
            _rewrite(path, copy)
        yield copy


def _copy_folder(path: Path, copy: Path) -> None:
    folders = [folder for folder in part_folders(path) if (folder / PICKLE).is_file()]
    if not folders:
        raise AdapterFileError(f"{path} holds no {PICKLE}; leave --from-pickle out.")
    for folder in folders:
        target = copy / folder.relative_to(path)
        target.mkdir(parents=True)
        shutil.copyfile(folder / CONFIG, target / CONFIG)
        _rewrite(folder / PICKLE, target / TENSORS)


def _rewrite(pickle: Path, path: Path) -> None:
    safetensors_file.save({name: as_array(tensor) for name, tensor in load_pickle(pickle).items()}, {}, path)


def _refuse_compressed(path: Path) -> None:
    """Refuses archives that grow when they are read; torch itself stores its tensors as they are."""
    if not is_zipfile(path):
        return
    try:
        with ZipFile(path) as archive:
            is_compressed = any(entry.compress_type != ZIP_STORED for entry in archive.infolist())
    except (BadZipFile, NotImplementedError, ValueError) as error:
        raise AdapterFileError(f"{path} is a damaged archive ({error}).") from error
    if is_compressed:
        raise AdapterFileError(f"{path} is a compressed archive, which torch does not write; it cannot be converted.")


def _leaves(content: Any, name: str, depth: int, path: Path) -> Iterator[tuple[str, Any]]:
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        yield name, content
        return
    for key, value in content.items():
        if not isinstance(key, str):
            raise AdapterFileError(f"{path} names a value {key!r}, which is no text; it cannot be converted.")
        yield from _leaves(value, f"{name}.{key}" if name else key, depth + 1, path)


def _plain(value: Any, name: str, path: Path) -> Tensor:
    """Returns a dense tensor of its own; a few bytes can claim to be terabytes by strides of zero."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise AdapterFileError(
            f"{path} holds {name or 'a value'} of type {type(value).__name__}; only tables of tensors are converted."
        )
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        raise AdapterFileError(f"{path} holds {name} as no plain tensor (sparse, quantized or complex).")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise AdapterFileError(
            f"{path} gives {name} more numbers than it stores; it is damaged or made to fill memory."
        )
    return value.detach().clone(memory_format=torch.contiguous_format)
