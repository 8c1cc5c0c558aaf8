"""Steps on adapter files that need no base model, and no library that takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError, ConfigError, InputError, UnsupportedError
from lora_diffusion.core.files import check_writable, sha256
from lora_diffusion.core.protocols import Family, Format
from lora_diffusion.core.types import AdapterState
from lora_diffusion.formats import detect, stored_dtypes
from lora_diffusion.formats.clients import guess_family


def check_target(path: Path, format_: Format, overwrite: bool) -> None:
    """Checks that writing an adapter to a path destroys nothing but an adapter.

    Raises:
        ConfigError: it exists and is not to be, or must not be, replaced.
    """
    check_writable(path.absolute().parent, "--output")
    if path.exists() and not overwrite:
        raise ConfigError(f"--output {path} exists; give another name or --overwrite.")
    if path.is_dir() and not format_.is_folder:
        raise ConfigError(f"--output {path} is a folder, and {format_.name} writes a file; name a file in it.")
    if path.is_dir() and any(path.iterdir()) and detect(path) != format_.name:
        raise ConfigError(f"--output {path} is a folder that holds something else; give another name.")


def read_alone(path: Path, family_name: str | None = None) -> tuple[Family, AdapterState]:
    """Reads an adapter without its base.

    Args:
        path: file or folder.
        family_name: kind of base; without it, the one that tensors or metadata tell, else the first that knows all of
            the modules.

    Raises:
        AdapterFileError: it cannot be read, or no family knows all of it.
        ConfigError: there is no such family.
    """
    format_: Format = registry.find("formats", detect(path))
    guess = family_name or _guess(path)
    # Sizes alone may deceive: a text encoder of SDXL is as wide as Whisper large.
    others = [] if family_name else [name for name in registry.available("families") if name != guess]
    faults: list[InputError] = []
    for name in [guess, *others] if guess else others:
        family: Family = registry.find("families", name)
        try:
            return family, format_.read(path, family.key_map(format_.name, None))
        except (AdapterFileError, UnsupportedError) as error:
            faults.append(error)
    # A family without names for the format says less than one that misses a module.
    raise next((fault for fault in faults if isinstance(fault, AdapterFileError)), faults[0])


def _guess(path: Path) -> str | None:
    try:
        return guess_family(path)
    except AdapterFileError:
        return None


def common_dtype(paths: Iterable[Path]) -> str:
    """Returns the number type that all tensors of adapters are stored in, fp32 where they differ."""
    names = {"F16": "fp16", "BF16": "bf16"}
    found = set().union(*(stored_dtypes(path) for path in paths))
    return names.get(found.pop(), "fp32") if len(found) == 1 else "fp32"


def file_names(paths: Sequence[Path]) -> list[str]:
    """Returns names without folders, with a number where one occurs again.

    >>> file_names([Path("a/x"), Path("b/x"), Path("y")])
    ['x (1)', 'x (2)', 'y']
    """
    names = [path.name for path in paths]
    numbered = (f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names))
    return [longer if names.count(name) > 1 else name for name, longer in zip(names, numbered, strict=True)]


def hash_adapter(path: Path) -> str:
    """Returns the sha256 of a file, or those of the files of a folder, joined by spaces."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return " ".join(map(sha256, files))
