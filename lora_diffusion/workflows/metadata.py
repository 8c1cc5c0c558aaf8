"""The texts in the header of an adapter file: printed, changed, removed. The tensors keep every byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import AdapterFileError, ConfigError
from lora_diffusion.core.files import check_writable, is_text
from lora_diffusion.core.text import shown
from lora_diffusion.formats import metadata as texts
from lora_diffusion.formats.metadata import data_url
from lora_diffusion.tensorfile.safetensors_file import Header, arrays_of, read_content, read_header, rewrite
from lora_diffusion.workflows._adapter_files import check_replaceable


@dataclass(frozen=True)
class MetadataChange:
    """What became of the metadata of a file."""

    path: Path
    metadata: Mapping[str, str]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    kept: tuple[str, ...]
    """Those by which apps know the base."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "file": str(self.path),
            "changed": list(self.changed),
            "removed": list(self.removed),
            "metadata": dict(self.metadata),
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"Wrote {self.path}: {len(self.changed)} texts set, {len(self.removed)} taken out; tensors unchanged."]
        if self.removed and self.kept:
            lines.append(f"Kept {', '.join(self.kept)}, without which A1111 and Forge would hide the file.")
        return "\n".join(lines)


@dataclass(frozen=True)
class Metadata:
    """The metadata of a file."""

    values: Mapping[str, str]
    """Sorted by name."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dict(self.values)

    def text(self) -> str:
        """Returns one line for each; long texts are shortened."""
        return "\n".join(f"{shown(key)}: {shown(value, 400)}" for key, value in self.values.items()) or "no metadata"


def show_metadata(path: Path) -> Metadata:
    """Returns the metadata of a file.

    Raises:
        AdapterFileError: it is no safetensors file.
    """
    return Metadata(dict(sorted(_header(path).metadata.items())))


def edit_metadata(
    path: Path,
    values: Mapping[str, str],
    removed: Sequence[str] = (),
    *,
    thumbnail: Path | None = None,
    output_path: Path | None = None,
    overwrite: bool = False,
) -> MetadataChange:
    """Sets and takes out texts, computes the hashes of the file again and writes it.

    Args:
        path: safetensors file.
        values: name -> text.
        removed: names.
        thumbnail: an image that becomes modelspec.thumbnail.
        output_path: where to write; the file itself without one.
        overwrite: replace another adapter that is there.

    Raises:
        InputError: the file, an image or a name cannot be used; nothing is written then.
    """
    if odd := [f"{key}={value}" for key, value in values.items() if not is_text(key + value)]:
        raise ConfigError(f"--set {odd[0]} is not UTF-8; type it in a terminal that is set to UTF-8.")
    images = {}
    if thumbnail:
        from lora_diffusion.data.images import open_rgb  # the other edits do not wait for Pillow

        images["modelspec.thumbnail"] = data_url(open_rgb(thumbnail))
    header = _header(path)
    return _write(path, header, texts.change(header.metadata, {**values, **images}, removed), output_path, overwrite)


def strip_metadata(
    path: Path, kept: Sequence[str] = (), output_path: Path | None = None, *, overwrite: bool = False
) -> MetadataChange:
    """Takes out all texts but those that apps need to list the file, and those that are named.

    Args:
        path: safetensors file.
        kept: names; one that ends in "*" means all that begin so.
        output_path: where to write; the file itself without one.
        overwrite: replace another adapter that is there.

    Raises:
        InputError: the file or a name cannot be used; nothing is written then.
    """
    header = _header(path)
    return _write(path, header, texts.strip(header.metadata, kept), output_path, overwrite)


def _header(path: Path) -> Header:
    if path.is_dir():
        inside = ", ".join(str(file) for file in sorted(path.rglob("*.safetensors"))[:3]) or "none in it"
        raise AdapterFileError(f"{path} is a folder; name a file of it: {inside}.")
    return read_header(path)


def _write(
    path: Path, header: Header, metadata: Mapping[str, str], output_path: Path | None, overwrite: bool
) -> MetadataChange:
    target = output_path or path
    check_writable(target.absolute().parent, "--output")
    if target.is_dir():
        raise ConfigError(f"--output {target} is a folder; name a file.")
    if target.resolve() != path.resolve():
        check_replaceable(target, overwrite)
    old, tensors = header.metadata, arrays_of(header, read_content(path, header))
    # The tensors stay in the order that the file has, which need not be that of the safetensors library.
    computed = texts.hashes(tensors, metadata, {name: header.tensors[name] for name in tensors})
    new = {**metadata, **{key: value for key, value in computed.items() if key in metadata}}
    rewrite(path, header, new, target)
    return MetadataChange(
        target,
        new,
        changed=tuple(key for key, value in new.items() if old.get(key) != value),
        removed=tuple(key for key in old if key not in new),
        kept=tuple(key for key in texts.VISIBLE if key in new),
    )
