"""The models that score. Each is loaded once, and each image and each text goes through each of them once."""

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
"""Role of a scorer -> function (name, device) -> model. Metrics of other packages load their own themselves."""

Encode = Callable[[Callable[[Sequence[Any]], Tensor], Sequence[Any]], Tensor]
"""Encodes a sequence with a function; processes can share the work so."""


class Scorers:
    """Scoring models by their role, and the vectors of images and texts that they gave."""

    def __init__(
        self,
        names: Mapping[str, str],
        device: str | torch.device = "cpu",
        models: Mapping[str, Any] | None = None,
        encode: Encode = lambda function, items: function(items),
    ) -> None:
        """Loads nothing yet.

        Args:
            names: role -> name of the model, say "clip" -> "builtin:emoji-clip".
            device: where the models compute.
            models: role -> model, of those that are loaded already.
            encode: calls a model's function on images or texts.
        """
        self.names = dict(names)
        self._device, self._encode = device, encode
        self._models = dict(models or {})
        self._known: dict[tuple[str, Hashable], Tensor] = {}
        self._latest: Sequence[Any] = ()

    def find(self, role: str) -> Any:
        """Returns a model, loaded on first use.

        Raises:
            ConfigError: no model of this role was named.
            ModelError: it cannot be loaded.
        """
        if role not in self._models:
            if role not in self.names or role not in LOADERS:
                raise ConfigError(f"No scorer {role} was named; give --scorer {role}=NAME.")
            self._models[role] = LOADERS[role](self.names[role], self._device)
        return self._models[role]

    def see(self, role: str, images: Sequence[Path | Image]) -> Tensor:
        """Returns the unit vectors of images, [num_images, dim] float32 on the CPU; of files they are kept."""
        return self._vectors(role, self.find(role).encode_images, images)

    def look(self, role: str, images: Sequence[Path | Image]) -> Tensor:
        """Returns how images are drawn, [num_images, dim] float32 on the CPU; of files they are kept."""
        return self._vectors(f"look of {role}", self.find(role).encode_looks, images)

    def read(self, role: str, texts: Sequence[str]) -> Tensor:
        """Returns the unit vectors of texts, [num_texts, dim] float32 on the CPU; they are kept."""
        return self._vectors(role, self.find(role).encode_texts, texts)

    def _vectors(self, role: str, function: Callable[[Sequence[Any]], Tensor], items: Sequence[Any]) -> Tensor:
        keys = [(role, item if isinstance(item, str | Path) else id(item)) for item in items]
        if any(isinstance(key[1], int) and key not in self._known for key in keys):
            # The id of an image that is gone may become another's: only the latest are kept, and held.
            self._latest = items
            self._known = {key: row for key, row in self._known.items() if not isinstance(key[1], int)}
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self._known}
        if missing:
            self._known |= zip(missing, self._encode(function, list(missing.values())), strict=True)
        return torch.stack([self._known[key] for key in keys]) if keys else torch.empty(0, 0)
