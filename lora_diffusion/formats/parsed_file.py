"""An adapter file, or a folder as PEFT saves it, opened once for all that look at it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import AdapterFileError
from lora_diffusion.core.files import not_a_file, read_json
from lora_diffusion.formats.peft_config import check_config, read_diffusers_record
from lora_diffusion.formats.tensor_names import (
    EMBEDDING,
    PEFT_PREFIX,
    ParsedModule,
    ParsedTensor,
    group,
    parse_names,
)
from lora_diffusion.tensorfile import safetensors_file
from lora_diffusion.tensorfile.arrays import Array
from lora_diffusion.tensorfile.header import Header, pickled, read_header

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
"""What older versions of PEFT wrote instead."""


@dataclass(frozen=True, eq=False)
class ParsedPart:
    """One safetensors file: the adapter file itself, or that of one part in a folder of PEFT."""

    path: Path
    part: str
    """Name of the folder that it lies in; "" where that is the one that was named, or there is none."""
    header: Header
    source: Path
    """What messages call it."""
    is_in_folder: bool = False
    """It lies in a folder of PEFT, beside its record."""

    @cached_property
    def tensors(self) -> list[ParsedTensor]:
        """All names, taken apart, in the order in which they are stored."""
        places = sorted(self.header.tensors.items(), key=lambda item: item[1].place)
        return parse_names(dict(places))

    @cached_property
    def modules(self) -> tuple[dict[str, ParsedModule], list[str]]:
        """Module name -> its tensors, and the names without a place; packed embeddings left out."""
        return group(tensor for tensor in self.tensors if not tensor.name.startswith(EMBEDDING))

    def tensors_in(self, part: str) -> list[ParsedTensor]:
        """Returns the names without PEFT's prefix and with a part before them; "" where there is none."""
        return [
            ParsedTensor(full_name(name, part), full_name(module, part), suffix)
            for name, module, suffix in self.tensors
        ]

    @cached_property
    def content(self) -> bytearray:
        """All bytes behind the header."""
        return safetensors_file.read_content(self.path, self.header)

    @cached_property
    def unchecked(self) -> dict[str, Array]:
        """The tensors, of any shape and whatever numbers they hold, in the order in which they are stored."""
        return safetensors_file.arrays_of(self.header, self.content)

    def arrays(self) -> dict[str, Array]:
        """Returns the tensors, of any shape, as they are stored.

        Raises:
            AdapterFileError: some hold NaN or infinity, or no weights at all, up to ten named.
        """
        safetensors_file.check_numbers(self.source, self.unchecked)
        return self.unchecked

    @cached_property
    def content_hash(self) -> str:
        """The sha256 of all that follows the header."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The record of ranks and alphas beside it.

        Raises:
            AdapterFileError: it cannot be read.
            UnsupportedError: it describes another kind of adapter.
        """
        path, source = (location.parent / CONFIG for location in (self.path, self.source))
        if obstacle := not_a_file(path):
            raise AdapterFileError(f"{source} is {obstacle} and no file; get the folder again.")
        try:
            config: dict[str, Any] = read_json(path)
        except (OSError, ValueError) as error:
            raise AdapterFileError(f"{source} cannot be read as a LoRA configuration: {error}.") from error
        check_config(config, source)
        return config


@dataclass(frozen=True, eq=False)
class ParsedFile:
    """What was opened; tensors and records are read when they are asked for, once."""

    path: Path
    """What messages call it: the file or folder, or what it was made from."""
    is_folder: bool
    """It is as PEFT saves adapters."""
    parts: Sequence[ParsedPart]

    @property
    def headers(self) -> list[Header]:
        """The header of each part."""
        return [part.header for part in self.parts]

    @cached_property
    def names(self) -> list[str]:
        """All tensors, in the order of the headers."""
        return [name for header in self.headers for name in header.tensors]

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Those of all parts."""
        return {key: value for header in self.headers for key, value in header.metadata.items()}

    @cached_property
    def tensors(self) -> list[ParsedTensor]:
        """All names, taken apart, with the part before them and without PEFT's prefix."""
        return [tensor for part in self.parts for tensor in part.tensors_in(part.part)]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name, as in `tensors` -> shape."""
        return {
            full_name(name, part.part): info.shape for part in self.parts for name, info in part.header.tensors.items()
        }

    @cached_property
    def diffusers_record(self) -> dict[str, dict[str, Any]]:
        """Part -> what diffusers keeps of its ranks and alphas in the metadata; empty without.

        Raises:
            AdapterFileError: it cannot be read.
            UnsupportedError: it describes another kind of adapter.
        """
        return {} if self.is_folder else read_diffusers_record(self.parts[0].header.metadata, self.path)

    def stored_dtypes(self) -> set[str]:
        """Returns the dtypes of the matrices, as safetensors names them: F16, ..."""
        return {
            info.dtype
            for header in self.headers
            for name, info in header.tensors.items()
            if len(info.shape) > 1 and not name.startswith(EMBEDDING)
        }

    def check_record(self) -> None:
        """Checks that it is not the tensors of PEFT without the record beside them.

        Raises:
            AdapterFileError: it is.
        """
        if not self.is_folder and self.names and all(name.startswith(PEFT_PREFIX) for name in self.names):
            raise AdapterFileError(
                f"{self.path} holds only the tensors of a PEFT adapter, whose ranks and alphas stand in {CONFIG} "
                f"beside it; give the folder {self.path.parent} with both, under the names that PEFT gave them."
            )


def parse_file(path: Path, source: Path | None = None) -> ParsedFile:
    """Opens an adapter file or folder and reads the headers.

    Args:
        path: file or folder.
        source: what messages call it, if it was made from something else.

    Raises:
        AdapterFileError: one cannot be read, a folder holds no adapter, or older versions of PEFT wrote a pickle.
    """
    source = source or path
    if not path.is_dir():
        return ParsedFile(source, False, [ParsedPart(path, "", read_header(path), source)])
    folders = part_folders(path)
    for folder in folders:
        if not (folder / TENSORS).exists() and (folder / PICKLE).exists():
            raise pickled(folder / PICKLE, path, "NEW --to peft")
    parts = [
        ParsedPart(
            folder / TENSORS,
            "" if folder == path else folder.name,
            read_header(folder / TENSORS),
            source / folder.relative_to(path) / TENSORS,
            is_in_folder=True,
        )
        for folder in folders
    ]
    return ParsedFile(source, True, parts)


def part_folders(path: Path) -> list[Path]:
    """Returns the folders that hold an adapter each: `path` itself, or those in it.

    Raises:
        AdapterFileError: there is none.
    """
    folders = [config.parent for config in sorted([*path.glob(CONFIG), *path.glob(f"*/{CONFIG}")])]
    if not folders:
        raise AdapterFileError(f"{path} is not a PEFT adapter: neither it nor a folder in it holds {CONFIG}.")
    return folders


def full_name(name: str, part: str) -> str:
    """Returns a name without PEFT's prefix and with the part before it; "" where there is none."""
    bare = name.removeprefix(PEFT_PREFIX)
    return f"{part}.{bare}" if part else bare
