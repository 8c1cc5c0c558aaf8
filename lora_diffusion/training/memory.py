"""How much memory a run will need, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.runtime.bf16_emulation import upcast_dtype, without_bf16_emulation
from lora_diffusion.training.fake_tensor_step import take_step
from lora_diffusion.training.optim import Params, state_bytes
from lora_diffusion.training.trainer import forward_context


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training step, framework not counted."""

    weights_bytes: int
    """Frozen weights as they are stored, with the constants of their quantization."""
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """All that lives at the peak of the forward and backward pass besides gradients."""

    @property
    def total_bytes(self) -> int:
        """Sum of all."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Returns name for people -> bytes."""
        return {
            "frozen weights": self.weights_bytes,
            "adapter": self.adapter_bytes,
            "gradients": self.gradient_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.activation_bytes,
        }

    def line(self) -> str:
        """Returns one line for people."""
        parts = ", ".join(f"{name} {_gigabytes(count)}" for name, count in self.parts().items())
        return f"memory  about {_gigabytes(self.total_bytes)} for a step: {parts}"


def estimate(
    parts: Mapping[str, nn.Module],
    examples: Mapping[str, Mapping[str, Any]],
    params: Params,
    config: TrainConfig,
    *,
    weights_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
) -> MemoryEstimate:
    """Estimates the peak of a training step from shapes: the step is taken with fake tensors.

    Args:
        parts: networks on the meta device with their adapters; afterwards they cannot be used.
        examples: part -> keyword arguments of one call on the meta device; parts without one are released.
        params: of the adapters.
        config: gives precision, checkpointing and optimizer.
        weights_bytes: of the frozen weights as they are stored.
        dtype: of the frozen weights that are not quantized.
        device: where the run will be.
    """
    counts = [parameter.numel() for parameters in params.values() for parameter in parameters.values()]
    context = partial(forward_context, config.precision, device)
    set_up = checkpoint_activations if config.gradient_checkpointing else None
    kernels = _kernel_bytes(parts.values(), dtype, device)
    peak = take_step(parts, examples, device, dtype, context, set_up) + kernels
    gradients = 4 * sum(counts)
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        adapter_bytes=4 * sum(counts),
        gradient_bytes=gradients,
        optimizer_bytes=sum(state_bytes(config.optimizer, count) for count in counts),
        activation_bytes=max(peak - gradients, 0),
    )


def _kernel_bytes(networks: Iterable[nn.Module], dtype: torch.dtype, device: torch.device) -> int:
    """Returns what a kernel takes at most by itself: on CPUs oneDNN orders the weight of a convolution again."""
    if device.type != "cpu":
        return 0
    layers = (layer for network in networks for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return max((layer.weight.numel() for layer in layers), default=0) * upcast_dtype(dtype, device).itemsize


def checkpoint_activations(parts: Mapping[str, nn.Module]) -> None:
    """Makes networks of diffusers and transformers recompute the inside of each block in the backward pass.

    They do so in train mode only, which changes nothing else: their dropout is 0 and they hold no batch statistics.
    """
    for network in parts.values():
        device = next(chain(network.parameters(), network.buffers())).device
        settings = {"use_reentrant": False, "context_fn": partial(_recompute_contexts, device)}
        if enable := getattr(network, "enable_gradient_checkpointing", None):  # diffusers
            enable(partial(checkpoint, **settings))
        else:
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            # A part that is only a few layers, as LLaVA's projector, has no blocks to recompute.
            for set_checkpointing in [getattr(network, name) for name in names if hasattr(network, name)][:1]:
                set_checkpointing(settings)
        network.train()


def _recompute_contexts(device: torch.device) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns contexts for the first pass and for its repetition, to which the trainer's context does not reach."""
    return nullcontext(), without_bf16_emulation(device)


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
