"""Safetensors files of any size, read and written one tensor at a time.

The library maps a file into memory, where every page that was touched counts as used; plain reads hold one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_diffusion.core.errors import ModelError, NonFiniteError, VerificationError
from lora_diffusion.tensorfile.arrays import stored_name, torch_dtype
from lora_diffusion.tensorfile.header import LENGTH_BYTES, TensorInfo, encode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OUTDATED = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
_SHOWN = 10

Change = Callable[["Tensor"], "Tensor"]
"""Takes a tensor as stored and returns it changed, float32, in the same shape."""


class _Stored(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file of which single tensors are read."""

    def __init__(self, path: Path) -> None:
        """Reads the header; the library checks it.

        Raises:
            ModelError: missing, cut off, no such file, or of a dtype that torch lacks.
        """
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(path, framework="pt") as file, path.open("rb") as stream:
                start = LENGTH_BYTES + int.from_bytes(stream.read(LENGTH_BYTES), "little")
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                self.tensors: dict[str, _Stored] = {}
                # Tensors lie one behind the other without gaps, or the library would have refused the file.
                for name in file.offset_keys():
                    slice_ = file.get_slice(name)
                    stored = _Stored(_dtype(path, name, slice_.get_dtype()), tuple(slice_.get_shape()), start)
                    self.tensors[name] = stored
                    start += stored.num_bytes
        except (SafetensorError, FileNotFoundError) as error:
            raise ModelError(f"{path} is missing or no whole .safetensors file ({error}); fetch it again.") from error

    def read(self, name: str) -> Tensor:
        """Returns a tensor of any shape, as stored."""
        import torch

        stored = self.tensors[name]
        if not stored.num_bytes:
            return torch.empty(stored.shape, dtype=stored.dtype)
        content = bytearray(stored.num_bytes)
        with self.path.open("rb") as stream:
            stream.seek(stored.start)
            if stream.readinto(content) != len(content):
                raise ModelError(f"{self.path} was cut off while it was read; fetch it again.")
        return torch.frombuffer(content, dtype=stored.dtype).reshape(stored.shape)

    def size_as(self, dtypes: Mapping[str, torch.dtype]) -> int:
        """Returns the bytes of all tensors, the named ones in other dtypes."""
        return sum(stored.num_bytes for stored in self._recast(dtypes).values())

    def rewrite(
        self, target: Path, changes: Mapping[str, Change], dtypes: Mapping[str, torch.dtype], added: Mapping[str, str]
    ) -> None:
        """Writes the file again with some tensors changed.

        Args:
            target: written; what stands there is lost.
            changes: tensor name -> change.
            dtypes: tensor name -> its new dtype; all others keep their own.
            added: to the metadata.

        Raises:
            NonFiniteError: a value does not fit its dtype.
        """
        layout = self._recast(dtypes)
        kept = {key: text for key, text in self.metadata.items() if key not in _OUTDATED}
        with target.open("wb") as new:
            # transformers refuses a file that has metadata but does not say "pt".
            new.write(_header(layout, {"format": "pt", **kept, **added}))
            for name, stored in layout.items():
                new.write(_bits(self._expected(name, stored.dtype, changes)).numpy().data)

    def verify(self, target: Path, changes: Mapping[str, Change], dtypes: Mapping[str, torch.dtype]) -> None:
        """Compares what `rewrite` wrote bit for bit with what it must hold.

        Raises:
            VerificationError: it differs; lists up to ten tensors.
        """
        import torch

        new, layout = TensorFile(target), self._recast(dtypes)
        if new.tensors.keys() != layout.keys():
            raise VerificationError(f"{target} was read back with other names; is the disk sound?")
        wrong = [
            name
            for name, stored in layout.items()
            if not torch.equal(_bits(new.read(name)), _bits(self._expected(name, stored.dtype, changes)))
        ]
        if wrong:
            raise VerificationError(f"{target} was read back with other numbers; is the disk sound?", wrong[:_SHOWN])

    def _recast(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, _Stored]:
        """Returns what the new file holds, largest numbers first: a tensor begins at a multiple of its dtype."""
        layout = {name: stored._replace(dtype=dtypes.get(name, stored.dtype)) for name, stored in self.tensors.items()}
        return dict(sorted(layout.items(), key=lambda item: -item[1].dtype.itemsize))

    def _expected(self, name: str, dtype: torch.dtype, changes: Mapping[str, Change]) -> Tensor:
        import torch

        old, change = self.read(name), changes.get(name)
        new = (change(old) if change else old).to(dtype)
        if (change or new.dtype != old.dtype) and not bool(torch.isfinite(new).all()):
            raise NonFiniteError(
                f"{name} would hold values that {dtype} cannot; take another --dtype, or smaller weights."
            )
        return new


def _header(layout: Mapping[str, _Stored], metadata: Mapping[str, str]) -> bytes:
    tensors, start = {}, 0
    for name, stored in layout.items():
        end = start + stored.num_bytes
        tensors[name] = TensorInfo(stored_name(stored.dtype), stored.shape, (start, end))
        start = end
    return encode(tensors, metadata)


def _bits(tensor: Tensor) -> Tensor:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _dtype(path: Path, tensor: str, name: str) -> torch.dtype:
    dtype = torch_dtype(name)
    if dtype is None:
        raise ModelError(f"{path} stores {tensor} as {name}, which cannot be read here; take another copy of it.")
    return dtype
