"""Two processes make the step that one makes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file

from lora_diffusion.core.samples import Batch
from tests.training.toy import Toy, ToyBatches


class Share(ToyBatches):
    """Every second batch of a step."""

    rank = 0

    def steps(self, start_step: int) -> Iterator[tuple[Batch, ...]]:
        for micro_batches in super().steps(start_step):
            yield micro_batches[self.rank :: 2]


def train_share(rank: int, run_path: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()
    assert PartialState(cpu=True).num_processes == 2
    batches = Share(5, batch_size=2, accumulation=2)
    batches.rank = rank
    Toy(dropout=0.0).trainer(run_path, max_steps=4).fit(batches)
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Five images in batches of two: the second process gets fewer images, and in every second step none."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=train_share, args=(rank, tmp_path / "two")) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    one = Toy(dropout=0.0)
    one.trainer(tmp_path / "one", max_steps=4).fit(ToyBatches(5, batch_size=2, accumulation=2))
    two = load_file(tmp_path / "two/checkpoints/step-000004/adapter.safetensors")
    for name, value in one.weights().items():
        part = "unet" if name.startswith("0") else "text_encoder"
        torch.testing.assert_close(two[f"{part}/{name}"], value, rtol=1e-4, atol=1e-6)  # other order of sums
    lines = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert '"samples": 4' in lines[0]
    assert '"samples": 1' in lines[1]
