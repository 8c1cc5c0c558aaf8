"""Base checkpoints on disk, of which no network is ever in memory as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import ConfigError, ModelError
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.tensorfile.streaming import TensorFile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TEXT = "text_model."
_WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias", "positional_embedding", "text_projection")
"""Last words of the names of weights. What is called otherwise is a buffer or a mark, whatever its shape: the noise
schedule (alphas_cumprod, betas, sigmas), position_ids, attention masks, logit_scale, scales of quantized weights."""
_ROW_THIRDS = {"q": 0, "k": 1, "v": 2}


class Place(NamedTuple):
    """Where the weight of a module stands."""

    file: Path
    name: str
    """Of the tensor."""
    mark: str = ""
    """q, k or v: that third of the rows; t: transposed; else the whole tensor."""

    def view(self, tensor: Tensor) -> Tensor:
        """Returns the module's weight, [out, ...], as a view of the tensor, [out, ...], [3 * out, in] or transposed."""
        if self.mark in _ROW_THIRDS:
            return tensor.chunk(3)[_ROW_THIRDS[self.mark]]
        return tensor.T if self.mark == "t" else tensor


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder, the folder of one transformers model, or a single file with LDM names."""

    path: Path
    files: Mapping[Path, TensorFile]
    """Those that may hold weights of its modules."""
    names: Mapping[ModuleKey, tuple[tuple[str | None, str], ...]]
    """Module -> where it may stand: folder of the part (None: anywhere) and name of its weight, with its mark behind
    "#"."""

    def places(self, key: ModuleKey, tensor: str = "weight") -> tuple[Place, ...]:
        """Returns every place of a module's weight, or of its bias: a folder may hold it in several dtypes.

        Raises:
            ModelError: there is none.
        """
        places = []
        for path, file in self.files.items():
            for folder, marked in self.names.get(key, ()):
                name, _, mark = marked.partition("#")
                name = name.removesuffix("weight") + "bias" if tensor == "bias" else name
                if folder in (None, path.parent.name) and name in file.tensors:
                    places.append(Place(path, name, mark))
                    break
        if not places:
            raise ModelError(f"{self.path} has no {tensor} of {key.part}/{key.path}.")
        return tuple(places)

    def weights(self, path: Path) -> list[str]:
        """Returns the names of all weights and biases of its networks in one of its files, stored unquantized.

        The VAE belongs to no network that an adapter changes, nor do copies of the weights such as `model_ema`.
        """
        file = self.files[path]
        prefixes = ("",) if self.path.is_dir() else self._prefixes(file)
        return [
            name
            for name, stored in file.tensors.items()
            if is_plain(stored.dtype) and name.startswith(prefixes) and name.rpartition(".")[2] in _WEIGHTS
        ]

    def _prefixes(self, file: TensorFile) -> tuple[str, ...]:
        """Returns how the names of each network begin in a single file."""
        names_of: dict[str, list[str]] = {}
        for key, pairs in self.names.items():
            plain = (name.partition("#")[0] for _, name in pairs)
            names_of.setdefault(key.part, []).extend(name for name in plain if name in file.tensors)
        return tuple(_common_start(names) for names in names_of.values() if names)

    def read(self, key: ModuleKey) -> Tensor:
        """Returns the weight of a module, [out, ...], as stored, from the first of its places."""
        place = self.places(key)[0]
        return place.view(self.files[place.file].read(place.name))


def _common_start(names: Sequence[str]) -> str:
    """Returns the words that all names begin with."""
    words = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len(set(column)) == 1, words))


def is_plain(dtype: torch.dtype) -> bool:
    """Says whether a dtype holds weights unquantized.

    Floating-point numbers of 8 bits are quantized, too: they come with scales, or have lost what those hold.
    """
    return dtype.is_floating_point and dtype.itemsize > 1


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
        in_file = {
            key: tuple((None, name if "#" in name else f"{name}.weight") for name in aliases)
            for key, aliases in names.all_names().items()
        }
        return Checkpoint(path, {path: TensorFile(path)}, in_file)
    files = [file for part in parts for file in sorted((path / part).glob("*.safetensors"))]
    if not files and (whole := sorted(path.glob("model*.safetensors"))):
        # Models of several networks are often saved under the names of older versions of transformers.
        in_model = {
            key: tuple((None, f"{name}.weight") for name in aliases) for key, aliases in names.all_names().items()
        }
        return Checkpoint(path, {file: TensorFile(file) for file in whole}, in_model)
    if not files:
        raise ModelError(
            f"{path} holds no networks to work on: give a diffusers folder with {', '.join(parts)}, or a checkpoint "
            "in one .safetensors file."
        )
    return Checkpoint(path, {file: TensorFile(file) for file in files}, {key: _live_names(key) for key, _ in names})


def _live_names(key: ModuleKey) -> tuple[tuple[str, str], ...]:
    # transformers 5.6 flattened CLIPTextModel; folders saved before and after it name the same weight in two ways.
    bare = key.path.removeprefix(_TEXT)
    paths = dict.fromkeys((key.path, bare, _TEXT + bare))
    return tuple((key.part, f"{path}.weight") for path in paths)


def check_space(folder: Path, num_bytes: int) -> None:
    """Checks that the disk of a folder, which need not exist yet, has space left.

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
