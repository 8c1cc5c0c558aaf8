"""The models that score. Each is loaded once, and each picture and each text goes through each of them once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.scoring.clip import load_clip
from lora_diffusion.scoring.dino import load_dino
from lora_diffusion.scoring.probe import load_probe

LOADERS: Mapping[str, Callable[..., Any]] = {
    "clip": load_clip,
    "dino": load_dino,
    "preference": load_clip,
    "probe": load_probe,
}
"""Kind of scorer -> function (name, device) -> model. Metrics of other packages load other kinds themselves."""

Encode = Callable[[Callable[[Sequence[Any]], Tensor], Sequence[Any]], Tensor]
"""Encodes a sequence with a function; processes can share the work so."""


class Scorers:
    """Scoring models by their kind, and what they made of pictures and texts."""

    def __init__(
        self,
        names: Mapping[str, str],
        device: str | torch.device = "cpu",
        models: Mapping[str, Any] | None = None,
        encode: Encode = lambda function, items: function(items),
    ) -> None:
        """Loads nothing yet.

        Args:
            names: kind -> name of the model, say "clip" -> "builtin:emoji-clip".
            device: where the models compute.
            models: kind -> model, of those that are loaded already.
            encode: calls a model's function on pictures or texts.
        """
        self.names = dict(names)
        self._device, self._encode = device, encode
        self._models = dict(models or {})
        self._known: dict[tuple[str, Hashable], Tensor] = {}

    def find(self, kind: str) -> Any:
        """Returns a model, loaded on first use.

        Raises:
            ConfigError: no model of this kind was named.
            ModelError: it cannot be loaded.
        """
        if kind not in self._models:
            if kind not in self.names or kind not in LOADERS:
                raise ConfigError(f"No scorer {kind} was named; give --scorer {kind}=NAME.")
            self._models[kind] = LOADERS[kind](self.names[kind], self._device)
        return self._models[kind]

    def see(self, kind: str, pictures: Sequence[Path | Image]) -> Tensor:
        """Returns the unit vectors of pictures, [num_pictures, dim] float32 on the CPU; those of files are kept."""
        return self._vectors(kind, self.find(kind).encode_images, pictures)

    def read(self, kind: str, texts: Sequence[str]) -> Tensor:
        """Returns the unit vectors of texts, [num_texts, dim] float32 on the CPU; they are kept."""
        return self._vectors(kind, self.find(kind).encode_texts, texts)

    def _vectors(self, kind: str, function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        keys = [(kind, item if isinstance(item, str | Path) else id(item)) for item in items]
        fresh = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        vectors = dict(zip(fresh, self._encode(function, list(fresh.values())), strict=True)) if fresh else {}
        # The id of a picture in memory may become another's, so only names are kept.
        self._known.update({key: row for key, row in vectors.items() if isinstance(key[1], str | Path)})
        rows = [vectors[key] if key in vectors else self._known[key] for key in keys]
        return torch.stack(rows) if rows else torch.empty(0, 0)
