"""Base checkpoints on disk, read and written tensor by tensor, so that no network is ever in memory as a whole."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_diffusion.core.errors import ConfigError, ModelError, NonFiniteError, VerificationError
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.types import ModuleKey

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TEXT = "text_model."
_ROW_THIRDS = {"q": 0, "k": 1, "v": 2}
_ALIGNMENT = 8
_OUTDATED = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_SHOWN = 10

Change = Callable[["Tensor"], "Tensor"]
"""Takes a tensor as stored and returns it changed, float32, in the same shape."""


class Place(NamedTuple):
    """Where the weight of a module stands."""

    file: Path
    name: str
    """Of the tensor."""
    mark: str = ""
    """q, k or v: that third of the rows; t: transposed; else the whole tensor."""

    def view(self, tensor: Tensor) -> Tensor:
        """Returns the module's weight as a view of the tensor."""
        if self.mark in _ROW_THIRDS:
            return tensor.chunk(3)[_ROW_THIRDS[self.mark]]
        return tensor.T if self.mark == "t" else tensor


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, the folder of one transformers model, or a single file with LDM names."""

    path: Path
    files: Mapping[Path, frozenset[str]]
    """Safetensors file -> names of its tensors."""
    names: Mapping[ModuleKey, tuple[tuple[str | None, str], ...]]
    """Module -> where it may stand: folder of the part (None: anywhere) and name, with its mark behind "#"."""

    def places(self, key: ModuleKey) -> tuple[Place, ...]:
        """Returns every place of a module's weight: a folder may hold it in several number types.

        Raises:
            ModelError: there is none.
        """
        found = []
        for file, names in self.files.items():
            for folder, spelled in self.names.get(key, ()):
                name, _, mark = spelled.partition("#")
                if folder in (None, file.parent.name) and name in names:
                    found.append(Place(file, name, mark))
                    break
        if not found:
            raise ModelError(f"{self.path} has no weight of {key.part}/{key.path}.")
        return tuple(found)

    @contextmanager
    def reading(self) -> Iterator[Callable[[ModuleKey], Tensor]]:
        """Opens the files and yields what gives the weight of a module in float32, from the first of its places."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(opened(path)) for path in self.files}

            def read(key: ModuleKey) -> Tensor:
                place = self.places(key)[0]
                return place.view(files[place.file].get_tensor(place.name).float())

            yield read


def open_checkpoint(path: Path, parts: Iterable[str], names: KeyMap) -> Checkpoint:
    """Looks into a checkpoint without reading weights.

    Args:
        path: diffusers folder, folder of one transformers model, or single file.
        parts: folders of the networks that may be changed.
        names: of a single file its names, the format "ldm"; of a folder those of the format "peft".

    Raises:
        ModelError: nothing is there, or it is no safetensors file.
    """
    if path.is_file():
        spelled = {key: ((None, name if "#" in name else f"{name}.weight"),) for key, name in names}
        return Checkpoint(path, {path: _names(path)}, spelled)
    files = [file for part in parts for file in sorted((path / part).glob("*.safetensors"))]
    if not files and (whole := sorted(path.glob("model*.safetensors"))):
        in_model = {key: ((None, f"{name}.weight"),) for key, name in names}
        return Checkpoint(path, {file: _names(file) for file in whole}, in_model)
    if not files:
        raise ModelError(
            f"{path} holds no networks to work on: give a diffusers folder with {', '.join(parts)}, or a checkpoint "
            "in one .safetensors file."
        )
    return Checkpoint(path, {file: _names(file) for file in files}, {key: _live_names(key) for key, _ in names})


def _live_names(key: ModuleKey) -> tuple[tuple[str, str], ...]:
    # transformers 5.6 flattened CLIPTextModel; folders saved before and after it name the same weight in two ways.
    bare = key.path.removeprefix(_TEXT)
    paths = dict.fromkeys((key.path, bare, _TEXT + bare))
    return tuple((key.part, f"{path}.weight") for path in paths)


def _names(path: Path) -> frozenset[str]:
    with opened(path) as file:
        return frozenset(file.keys())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a safetensors file of which single tensors are read.

    Raises:
        ModelError: missing, cut off or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ModelError(f"{path} is missing or no whole .safetensors file ({error}); fetch it again.") from error


class _Layout(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def rewrite(
    source: Path, target: Path, changes: Mapping[str, Change], dtype: torch.dtype | None, told: Mapping[str, str]
) -> None:
    """Writes a safetensors file again with some tensors changed, one tensor at a time.

    Args:
        source: the file as it is.
        target: written; what stands there is lost.
        changes: tensor name -> change.
        dtype: number type of all floating-point tensors; None keeps each its own.
        told: added to the metadata of the file.

    Raises:
        NonFiniteError: a changed weight does not fit its number type.
    """
    with opened(source) as old, target.open("wb") as new:
        layout = _plan(old, dtype)
        kept = {key: text for key, text in (old.metadata() or {}).items() if key not in _OUTDATED}
        # transformers refuses a file that has metadata but does not say "pt".
        new.write(_header(layout, {"format": "pt", **kept, **told}))
        for tensor in layout:
            new.write(_bytes(_expected(old, tensor, changes)))


def verify(source: Path, target: Path, changes: Mapping[str, Change], dtype: torch.dtype | None) -> None:
    """Compares a file that `rewrite` wrote bit for bit with what it must hold, one tensor at a time.

    Raises:
        VerificationError: it differs; lists up to ten tensors.
    """
    import torch

    with opened(source) as old, opened(target) as new:
        layout = _plan(old, dtype)
        if {tensor.name for tensor in layout} != set(new.keys()):
            raise VerificationError(f"{target} was read back with other names; is the disk sound?")
        wrong = [
            tensor.name
            for tensor in layout
            if not torch.equal(_bits(new.get_tensor(tensor.name)), _bits(_expected(old, tensor, changes)))
        ]
    if wrong:
        raise VerificationError(f"{target} was read back with other numbers; is the disk sound?", wrong[:_SHOWN])


def size_after(source: Path, dtype: torch.dtype | None) -> int:
    """Returns the bytes that the tensors of a file take after `rewrite`."""
    with opened(source) as old:
        return sum(tensor.num_bytes for tensor in _plan(old, dtype))


def check_space(folder: Path, num_bytes: int) -> None:
    """Checks that the disk of a folder, which need not exist yet, has room.

    Raises:
        ConfigError: it has not.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(nearest).free
    if num_bytes > free:
        raise ConfigError(
            f"The result needs {num_bytes / 1e9:.2f} GB, but {nearest} has {free / 1e9:.2f} GB left; free some space "
            "or write elsewhere."
        )


def _plan(file: Any, dtype: torch.dtype | None) -> list[_Layout]:
    """Returns what the new file holds, in the order of the old one."""
    layout = []
    for name in file.offset_keys():
        slice_ = file.get_slice(name)
        own = _dtypes()[slice_.get_dtype()]
        layout.append(_Layout(name, dtype if dtype and own.is_floating_point else own, tuple(slice_.get_shape())))
    # safetensors asks that every tensor begins at a multiple of its number type.
    return sorted(layout, key=lambda tensor: -tensor.dtype.itemsize)


def _header(layout: Sequence[_Layout], metadata: Mapping[str, str]) -> bytes:
    names = {dtype: name for name, dtype in _dtypes().items()}
    values: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in layout:
        end = start + tensor.num_bytes
        values[tensor.name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _expected(file: Any, tensor: _Layout, changes: Mapping[str, Change]) -> Tensor:
    import torch

    old: Tensor = file.get_tensor(tensor.name)
    change = changes.get(tensor.name)
    new = (change(old) if change else old).to(tensor.dtype)
    if (change or new.dtype != old.dtype) and not bool(torch.isfinite(new).all()):
        raise NonFiniteError(
            f"{tensor.name} would hold values that {tensor.dtype} cannot; take another --dtype, or smaller weights."
        )
    return new


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _bytes(tensor: Tensor) -> memoryview:
    return _bits(tensor).numpy().data


def _dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
