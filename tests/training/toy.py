"""A linear model, its data and a closure as loss: all that the trainer needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.base_model import LossOutput
from lora_diffusion.core.samples import Batch
from lora_diffusion.training.trainer import Trainer


class ToyBatches:
    """Images 0 to n-1 in order, every epoch alike; the last batch of an epoch may be short."""

    def __init__(
        self,
        num_items: int = 10,
        batch_size: int = 2,
        accumulation: int = 1,
        bad: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        numbers = torch.arange(num_items)
        self._chunks = list(numbers.split(batch_size))
        self._accumulation = accumulation
        self._bad = bad
        self._weights = None if weights is None else torch.tensor(weights)
        self.num_steps_per_epoch = -(-len(self._chunks) // accumulation)

    def steps(self, start_step: int) -> Iterator[tuple[Batch, ...]]:
        step = start_step
        while True:
            epoch, index = divmod(step, self.num_steps_per_epoch)
            first = index * self._accumulation
            chunks = self._chunks[first : first + self._accumulation]
            yield tuple(self._batch(epoch, first + offset, chunk) for offset, chunk in enumerate(chunks))
            step += 1

    def _batch(self, epoch: int, index: int, chunk: torch.Tensor) -> Batch:
        x = torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(int(i))) for i in chunk])
        if self._bad is not None:
            x[chunk == self._bad] = float("nan")
        weights = None if self._weights is None else self._weights[chunk]
        return Batch(tuple(f"{int(i)}.png" for i in chunk), {"x": x}, (epoch, index), weights)


class Toy:
    """Two trainable layers with dropout, and noise from the generator."""

    def __init__(self, noise: float = 0.1, dropout: float = 0.2) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(dropout), nn.Linear(8, 3))
        parameters = dict(self.model.named_parameters())
        self.params = {
            "unet": {name: parameters[name] for name in ("0.weight", "0.bias")},
            "text_encoder": {name: parameters[name] for name in ("2.weight", "2.bias")},
        }
        self.noise = noise

    def loss(self, batch: Batch, rng: torch.Generator) -> LossOutput:
        x = batch.tensors["x"]
        error = self.model(x + self.noise * torch.randn(x.shape, generator=rng)) - x[:, :3]
        per_sample = error.float().square().mean(1)
        return LossOutput(per_sample, {"half": per_sample.detach().mean().item() / 2})

    def trainer(
        self,
        run_path: Path,
        hooks: tuple[Any, ...] = (),
        fingerprint: Any = None,
        module_rates: Mapping[ModuleKey, float] | None = None,
        **settings: Any,
    ) -> Trainer:
        config = TrainConfig(**{"learning_rate": 0.01, "threads": "1", "precision": "fp32", **settings})
        return Trainer(config, self.params, self.loss, run_path, hooks, fingerprint, module_rates)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}


def moments(trainer: Trainer) -> list[torch.Tensor]:
    return [state[name] for state in trainer.optimizer.state.values() for name in sorted(state)]
