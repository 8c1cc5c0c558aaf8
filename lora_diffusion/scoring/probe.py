"""A linear function of an image's vector, from a file that the user has."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.files import user_path

_LAYER = re.compile(r"(?:.*?(\d+)\.)?(weight|bias)")


@dataclass(frozen=True)
class Probe:
    """weight @ vector + bias."""

    name: str
    weight: Tensor
    """[dim]"""
    bias: float

    def apply(self, vectors: Tensor) -> Tensor:
        """Returns one number for each vector.

        Args:
            vectors: [num, dim].

        Raises:
            ModelError: the vectors have another length than the probe was fitted to.
        """
        if vectors.shape[1] != len(self.weight):
            raise ModelError(
                f"--scorer probe={self.name} wants vectors of length {len(self.weight)}, and --clip gives "
                f"{vectors.shape[1]}; name the CLIP that the probe was fitted to."
            )
        return vectors @ self.weight + self.bias


def load_probe(name: str, device: str | torch.device = "cpu") -> Probe:
    """Loads a probe: `weight` [1, dim] and `bias` [1], or a chain `layers.0.weight`, `layers.1.weight`, ...

    A chain of linear layers without anything between them, as the improved LAION aesthetic predictor has, is one linear
    layer and is folded into it.

    Raises:
        ModelError: no such file, or it holds something else.
    """
    del device  # one product of a matrix and a vector
    path = user_path(name, "--scorer probe")
    if not path.is_file():
        raise ModelError(f"--scorer probe={name}: there is no such file; give a .safetensors file.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ModelError(f"--scorer probe={name} is no safetensors file ({error}); convert it first.") from error
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if not match:
            raise ModelError(f"--scorer probe={name}: {key} is neither a weight nor a bias of a linear layer.")
        layers.setdefault(int(match[1] or 0), {})[match[2]] = tensor.float()
    try:
        weight, bias = _folded([layers[number] for number in sorted(layers)])
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"--scorer probe={name}: its layers do not fit together ({error}).") from error
    if weight.shape[0] != 1:
        raise ModelError(f"--scorer probe={name} gives {weight.shape[0]} numbers for an image; it must give one.")
    return Probe(name, weight[0], bias.item())


def _folded(layers: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Returns weight [out, in] and bias [out] of linear layers one after another."""
    weight, bias = layers[0]["weight"], layers[0]["bias"]
    for layer in layers[1:]:
        weight, bias = layer["weight"] @ weight, layer["weight"] @ bias + layer["bias"]
    return weight, bias
