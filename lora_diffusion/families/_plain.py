"""Networks as torch alone gives them, to look at and to rehearse a step with.

diffusers and transformers take seconds to import. What is asked before a base is loaded, its layers and what a step
needs of memory, needs neither: plain networks have the layers of theirs in the same order under the same names, and
make the same tensors. They are never given weights. A config that asks for more is the libraries' own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Recompute = Callable[..., Tensor]
"""(function, its arguments) -> its answer, whose insides are made anew in the backward pass."""


def told_sizes(
    config: Mapping[str, Any], needed: Mapping[str, Any], sizes: Mapping[str, Any], rest: frozenset[str]
) -> SimpleNamespace | None:
    """Returns the sizes that a config gives, or None where it gives what is not known here."""
    told = {key: value for key, value in config.items() if not key.startswith("_") and key not in rest}
    is_known = all(key in sizes or (key in needed and value == needed[key]) for key, value in told.items())
    return SimpleNamespace(**{**sizes, **{key: told[key] for key in sizes if key in told}}) if is_known else None


def each_level(value: Any, sizes: SimpleNamespace) -> Sequence[Any]:
    """Returns a value for each level."""
    return value if isinstance(value, list | tuple) else [value] * len(sizes.block_out_channels)


class Recomputable(nn.Module):
    """A module whose insides can be made anew in the backward pass."""

    recompute: Recompute | None = None

    def __call__(self, *args: Any) -> Tensor:
        """Answers as the module does."""
        call = super().__call__
        answer: Tensor = self.recompute(call, *args) if self.recompute and torch.is_grad_enabled() else call(*args)
        return answer


class Network(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config

    def enable_gradient_checkpointing(self, recompute: Recompute) -> None:
        """Lets each block be made anew in the backward pass."""
        for module in self.modules():
            if isinstance(module, Recomputable):
                module.recompute = recompute


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    return x.view(len(x), -1, num_heads, x.shape[-1] // num_heads).transpose(1, 2)
