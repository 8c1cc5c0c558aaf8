"""Steps on adapter files that need no base model, and no library that takes seconds to import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.identify import family_by_content, guess_family, refuse_other, sized_as
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState, ModuleKey
from lora_diffusion.core.errors import (
    AdapterFileError,
    ConfigError,
    InputError,
    NonFiniteError,
    NumberRangeError,
    UnsupportedError,
)
from lora_diffusion.core.files import check_writable, sha256
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.detect import detect, is_adapter
from lora_diffusion.formats.normalize import fit_dimensions
from lora_diffusion.formats.parsed_file import ParsedFile, parse_file
from lora_diffusion.tensorfile.arrays import in_float32
from lora_diffusion.workflows.bases import find_weights

if TYPE_CHECKING:
    from torch import nn

    from lora_diffusion.config.schema import ModelOptions

_FILE_ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")


def check_target(path: Path, format_: Format, overwrite: bool) -> None:
    """Checks that writing an adapter to a path destroys nothing but an adapter.

    Raises:
        ConfigError: it exists and is not to be, or must not be, replaced; or its ending is that of something else.
    """
    check_writable(path.absolute().parent, "--output")
    if path.is_dir() and overwrite and not format_.is_folder:
        raise ConfigError(f"--output {path} is a folder, and {format_.name} writes a file; name a file in it.")
    if path.is_file() and overwrite and format_.is_folder:
        raise ConfigError(f"--output {path} is a file, and {format_.name} writes a folder; give another name.")
    check_replaceable(path, overwrite)
    ending = path.suffix.lower()
    if format_.is_folder and ending in _FILE_ENDINGS:
        raise ConfigError(f"--output {path}: {format_.name} writes a folder; give a name without {ending}.")
    if not format_.is_folder and ending not in ("", ".safetensors"):
        raise ConfigError(f"--output {path}: {format_.name} writes safetensors; give a name that ends in .safetensors.")


def check_replaceable(path: Path, overwrite: bool) -> None:
    """Checks that nothing stands under a name, or an adapter that is to be replaced.

    Raises:
        ConfigError: what stands there is not to be, or must not be, replaced.
    """
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"--output {path} exists; give another name or --overwrite.")
    is_empty = path.is_dir() and not any(path.iterdir())
    if not is_empty and not is_adapter(path):
        what = "a folder that holds something else" if path.is_dir() else "no adapter, and nothing else is replaced"
        raise ConfigError(f"--output {path} is {what}; give another name.")


@dataclass(frozen=True)
class GivenBase:
    """A base whose networks are of another build than those that its family published."""

    family: Family
    model: ModelOptions
    parts: Mapping[str, nn.Module]
    """Its networks, without weights."""

    def read(self, file: ParsedFile) -> AdapterState:
        """Reads an adapter as `read_stored` does, with the names and dimensions of this base's modules.

        Raises:
            AdapterFileError: it cannot be read, or does not fit the base.
            UnsupportedError: it is of a variant that is not known.
        """
        from lora_diffusion.adapters.state import check_fit, weight_shapes

        format_: Format = registry.find("formats", detect(file))
        state = format_.read(file, self.family.key_map(format_.name, self.model))
        state = fit_dimensions(state, weight_shapes(self.parts))
        check_fit(state, self.parts, str(file.path))
        return state

    def kernels(self) -> dict[ModuleKey, tuple[int, ...]]:
        """Returns the sizes of its convolutions."""
        from lora_diffusion.adapters.state import weight_shapes

        return {key: shape[2:] for key, shape in weight_shapes(self.parts).items() if len(shape) > 2}


def find_base(path: str | None, family_name: str | None = None) -> GivenBase | None:
    """Returns the base that a user gave for names and shapes, None where none is given.

    Raises:
        ModelError: no family takes it; says why for each.
    """
    if path is None:
        return None
    model = find_weights(path, family_name)
    family: Family = registry.find("families", model.family)
    return GivenBase(family, model, family.meta_modules(model))


def names_of(family: Family, format_name: str, base: GivenBase | None) -> KeyMap:
    """Returns how a format calls the modules of a base, or of the one that a family published.

    Raises:
        UnsupportedError: the family has no names for the format.
    """
    return family.key_map(format_name, base.model if base else None)


def open_adapter(path: Path, source: Path | None = None) -> ParsedFile:
    """Opens an adapter file or folder for a base that is known here.

    Args:
        path: file or folder.
        source: what messages call it, if it was written from something else.

    Raises:
        AdapterFileError: it cannot be read.
        UnsupportedError: it was made for a base of another family, which is named.
    """
    file = parse_file(path, source)
    refuse_other(file)
    return file


def read_alone(file: ParsedFile, base: GivenBase | None = None) -> tuple[Family, AdapterState]:
    """Reads an adapter without its base, or with one that is given, in float32; raises as `read_stored`."""
    family, state = read_stored(file, base)
    return family, in_float32(state)


def read_stored(
    file: ParsedFile, base: GivenBase | None = None, family_name: str | None = None
) -> tuple[Family, AdapterState]:
    """Reads an adapter without its base and without torch, into arrays of the numbers as they are stored.

    Factors get as many dimensions as the weights of the published base have.

    Args:
        file: as `open_adapter` gives it.
        base: gives the names and dimensions; without it, those that were published.
        family_name: that of the base; without it, the one that tensors or metadata tell, else the first that knows all
            of the modules, beginning with the one that their names look like.

    Raises:
        AdapterFileError: it cannot be read, or no family knows all of it.
        UnsupportedError: it is of a variant, or for a base, that is not known.
        ConfigError: there is no such family.
    """
    if base is not None:
        return base.family, base.read(file)
    format_: Format = registry.find("formats", detect(file))
    sized = sized_as(file) if family_name in DIFFUSION else None
    if sized not in (None, family_name):
        raise AdapterFileError(f"{file.path} has the sizes of {sized}, not of {family_name}; leave --family out.")
    known = family_name or family_by_content(file)
    guess = known or _guess(file)
    # Names alone may deceive: some programs give all text encoders the prefix of SDXL's first.
    others = [] if known else [name for name in registry.available("families") if name != guess]
    errors: list[InputError] = []
    unnamed: list[InputError] = []
    for name in [guess, *others] if guess else others:
        family: Family = registry.find("families", name)
        try:
            names = family.key_map(format_.name, None)
        except UnsupportedError as error:
            unnamed.append(error)
            continue
        try:
            state = format_.read(file, names)
        except (AdapterFileError, UnsupportedError) as error:
            errors.append(error)
            continue
        return family, fit_dimensions(state, published_shapes(DIFFUSION[name])) if name in DIFFUSION else state
    # A family without names for the format says less than one that cannot read the file.
    raise (errors or unnamed)[0]


def _guess(file: ParsedFile) -> str | None:
    try:
        return guess_family(file)
    except AdapterFileError:
        return None


def common_dtype(files: Iterable[ParsedFile]) -> str:
    """Returns the dtype that all tensors of adapters are stored in, fp32 where they differ."""
    dtypes = {stored_dtype(file) for file in files}
    return (dtypes.pop() or "fp32") if len(dtypes) == 1 else "fp32"


def stored_dtype(file: ParsedFile) -> str | None:
    """Returns the dtype that the matrices of an adapter are stored in, None for several or an unusual one."""
    names = {"F16": "fp16", "BF16": "bf16", "F32": "fp32"}
    dtypes = file.stored_dtypes()
    return names.get(dtypes.pop()) if len(dtypes) == 1 else None


def file_names(paths: Sequence[Path]) -> list[str]:
    """Returns names without folders, with a number where one occurs again.

    >>> file_names([Path("a/x"), Path("b/x"), Path("y")])
    ['x (1)', 'x (2)', 'y']
    """
    names = [path.name for path in paths]
    numbered = (f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names))
    return [longer if names.count(name) > 1 else name for name, longer in zip(names, numbered, strict=True)]


@contextmanager
def dtype_named() -> Iterator[None]:
    """Makes numbers that the chosen dtype cannot hold an error of --dtype, and other infinite ones of the input.

    Raises:
        ConfigError: another dtype would hold them.
        AdapterFileError: none would.
    """
    try:
        yield
    except NumberRangeError as error:
        raise ConfigError(f"{error.message}; give --dtype bf16 or fp32.") from error
    except NonFiniteError as error:
        raise AdapterFileError(str(error)) from error


EMBEDDINGS = ("keep", "drop")
"""What can be done with text embeddings that are packed into an adapter file."""


def with_embeddings(state: AdapterState, choice: str) -> AdapterState:
    """Returns a state with its packed text embeddings, or without them if the choice is "drop"."""
    return state if choice == "keep" else replace(state, embeddings={})


def hash_adapter(path: Path) -> str:
    """Returns the sha256 of a file, or those of the files of a folder, joined by spaces."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return " ".join(map(sha256, files))
