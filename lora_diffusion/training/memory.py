"""How much memory a run will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.adapters.plan import InjectionPlan
from lora_diffusion.core.products import fast_products

_OPTIMIZER_COPIES = 4
"""float32 numbers for each adapter parameter: itself, its gradient and AdamW's two moments."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, framework not counted."""

    weights_bytes: int
    adapter_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all."""
        return self.weights_bytes + self.adapter_bytes + self.activation_bytes

    def line(self) -> str:
        """Returns one line for people."""
        parts = (
            ("frozen weights", self.weights_bytes),
            ("adapter, gradients and optimizer", self.adapter_bytes),
            ("activations", self.activation_bytes),
        )
        return f"memory  about {_gigabytes(self.total_bytes)}: " + ", ".join(f"{n} {_gigabytes(b)}" for n, b in parts)


def estimate(
    parts: Mapping[str, nn.Module],
    examples: Mapping[str, Mapping[str, Any]],
    plan: InjectionPlan,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> MemoryEstimate:
    """Estimates the peak of a training step.

    Args:
        parts: networks on the meta device.
        examples: part -> keyword arguments of one call, on the meta device; parts without one are released.
        plan: what is trained.
        dtype: number type of the frozen weights.
        compute_dtype: number type of activations.
        gradient_checkpointing: keep only the inputs of blocks; estimated as a fifth of all activations.
    """
    weights = sum(parameter.numel() for name in examples for parameter in parts[name].parameters())
    activations = sum(_saved_numbers(parts[name], kwargs) for name, kwargs in examples.items())
    share = 0.2 if gradient_checkpointing else 1.0
    return MemoryEstimate(
        weights_bytes=weights * dtype.itemsize,
        adapter_bytes=plan.num_parameters * 4 * _OPTIMIZER_COPIES,
        activation_bytes=int(activations * compute_dtype.itemsize * share),
    )


def checkpoint_activations(parts: Mapping[str, nn.Module]) -> None:
    """Makes networks of diffusers and transformers recompute the inside of each block in the backward pass.

    They do so in train mode only, which changes nothing else: their dropout is 0 and they hold no batch statistics.
    """
    for network in parts.values():
        device = next(network.parameters()).device
        settings = {"use_reentrant": False, "context_fn": partial(_recompute_contexts, device)}
        if enable := getattr(network, "enable_gradient_checkpointing", None):  # diffusers
            enable(partial(checkpoint, **settings))
        else:
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            # A part that is only a few layers, as LLaVA's projector, has no blocks to recompute.
            for own in [getattr(network, name) for name in names if hasattr(network, name)][:1]:
                own(settings)
        network.train()


def _recompute_contexts(device: torch.device) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns contexts for the first pass and for its repetition, to which the trainer's context does not reach."""
    return nullcontext(), fast_products(device)


def _saved_numbers(network: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """Counts the numbers that autograd keeps for the backward pass to the inputs."""
    network.requires_grad_(False)
    inputs = {name: _with_gradient(value) for name, value in kwargs.items()}
    if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values()):
        next(network.parameters()).requires_grad_()  # token ids carry no gradient, their embeddings do
    weights = {id(parameter) for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in weights and not isinstance(tensor, nn.Parameter):
            saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(**inputs)
    del output
    return sum(tensor.untyped_storage().nbytes() // tensor.dtype.itemsize for tensor in saved.values())


def _with_gradient(value: Any) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
