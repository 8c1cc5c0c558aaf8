"""The order in which a run sees its items: a function of the seed and the step, so that any step can be the first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

from lora_diffusion.config.schema import TrainConfig
from lora_diffusion.core.logs import logger
from lora_diffusion.core.rng import derive
from lora_diffusion.core.samples import Batch, Prepared
from lora_diffusion.runtime.device import process_group


class Batches:
    """Batches of prepared items, epoch after epoch.

    In an epoch each item appears `num_repeats` times, in batches of one group. The last batch of a group and the last
    step of an epoch may be shorter than the others; nothing is left out. With several processes each gets the same
    number of batches in a step; where the last step of an epoch does not divide evenly, batches from the start of the
    epoch are shown again.
    """

    def __init__(
        self,
        items: Sequence[Prepared],
        collate: Callable[[Sequence[Prepared]], Batch],
        *,
        batch_size: int,
        gradient_accumulation: int,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        """Plans the epochs; reads no tensor.

        Args:
            items: at least one.
            collate: stacks items of one group.
            batch_size: items in a batch, at most.
            gradient_accumulation: batches of one process in an optimizer step, at most.
            seed: decides the order.
            process_index: which process this is, from 0.
            num_processes: how many share the work; all must be given the same items and seed.
        """
        if not items or min(batch_size, gradient_accumulation, num_processes) < 1:
            raise ValueError("Batches needs items, and a batch_size, gradient_accumulation and num_processes above 0.")
        self._items = items
        self._collate = collate
        self._batch_size = batch_size
        self._seed = seed
        self._process_index = process_index
        self._num_processes = num_processes
        self._num_batches_per_step = gradient_accumulation * num_processes
        self._groups: dict[str, list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            self._groups[item.group] += [index] * item.num_repeats
        self._num_batches = sum(-(-len(indices) // batch_size) for indices in self._groups.values())
        padding = -self._num_batches % num_processes
        if padding and process_index == 0:
            logger.info("For %d processes, an epoch shows its first %d batches again.", num_processes, padding)

    @property
    def num_samples_per_epoch(self) -> int:
        """Items in an epoch, repeats counted."""
        return sum(map(len, self._groups.values()))

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self._num_batches // self._num_batches_per_step)

    def steps(self, start_step: int) -> Iterator[tuple[Batch, ...]]:
        """Yields without end the batches of this process for each optimizer step.

        Args:
            start_step: steps already made; they are skipped without being read.
        """
        first_epoch, first_step = divmod(start_step, self.num_steps_per_epoch)
        for epoch in count(first_epoch):
            order = self._order(epoch)
            for step in range(first_step, self.num_steps_per_epoch):
                yield tuple(self._batch(order, epoch, position) for position in self._positions(step))
            first_step = 0

    def _positions(self, step: int) -> range:
        start = step * self._num_batches_per_step
        end = min(start + self._num_batches_per_step, self._num_batches)
        end += -(end - start) % self._num_processes
        return range(start + self._process_index, end, self._num_processes)

    def _batch(self, order: Sequence[Sequence[int]], epoch: int, position: int) -> Batch:
        items = [self._items[index] for index in order[position % len(order)]]
        return replace(self._collate(items), position=(epoch, position))

    def _order(self, epoch: int) -> list[list[int]]:
        import torch

        rng = derive(self._seed, "order", epoch)
        size = self._batch_size
        batches = []
        for indices in self._groups.values():
            shuffled = [indices[place] for place in torch.randperm(len(indices), generator=rng).tolist()]
            batches += [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
        return [batches[place] for place in torch.randperm(len(batches), generator=rng).tolist()]


def make_batches(
    items: Sequence[Prepared], collate: Callable[[Sequence[Prepared]], Batch], train: TrainConfig
) -> Batches:
    """Returns the batches of a run, of which each process gets its share."""
    processes = process_group()
    return Batches(
        items,
        collate,
        batch_size=train.batch_size,
        gradient_accumulation=train.gradient_accumulation,
        seed=train.seed,
        process_index=processes.process_index,
        num_processes=processes.num_processes,
    )
