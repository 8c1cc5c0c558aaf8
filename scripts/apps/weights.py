"""Weights of a base that take no memory until they are needed, the same in every program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_diffusion.core.adapter_state import ModuleKey


class Place(NamedTuple):
    """One parameter of a base."""

    key: ModuleKey
    kind: str
    """weight or bias."""


class Outcome(NamedTuple):
    """What a program did with a file."""

    changes: Mapping[Place, Tensor]
    """By parameter; those that it touches, also where it adds zero."""
    num_unmatched: int
    """Tensors that found no place, as far as the program tells."""
    error: str = ""
    """Why it refused the whole file."""


def refused(error: Exception) -> Outcome:
    """Returns the outcome of a program that stopped."""
    return Outcome({}, 0, f"{type(error).__name__}: {error}"[:200])


def weight(shape: tuple[int, ...]) -> Tensor:
    """Returns a float32 weight whose columns differ, the same for the same shape."""
    return torch.arange(math.prod(shape), dtype=torch.float32).mul_(0.7).sin_().mul_(0.05).reshape(shape)


def without_memory(network: nn.Module) -> nn.Module:
    """Gives a network of the meta device parameters and buffers on the CPU that share one number each."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(1).expand(parameter.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros(1, dtype=buffer.dtype).expand(buffer.shape), persistent=False)
    return network
