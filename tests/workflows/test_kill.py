"""A run that is killed again and again ends with the very adapter of the run that never was.

LORA_DIFFUSION_KILLS sets the number of kills (5), at least 4.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from safetensors.torch import load_file

from tests.workflows.conftest import fill_with_pictures

NUM_STEPS = 60
NUM_KILLS = int(os.environ.get("LORA_DIFFUSION_KILLS", "5"))
ROOT = Path(__file__).parents[2]


class Killer:
    """Speaks to tests.workflows.killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._in: IO[str] = process.stdin  # type: ignore[assignment]
        self._out: IO[str] = process.stdout  # type: ignore[assignment]

    def run(self, arguments: list[str], seconds: float | None = None, watch: Path | None = None) -> dict[str, Any]:
        order = {"arguments": arguments, "seconds": seconds, "watch": str(watch) if watch else None}
        self._in.write(json.dumps(order) + "\n")
        self._in.flush()
        return json.loads(self._out.readline())


@pytest.fixture
def killer(tmp_path: Path) -> Iterator[Killer]:
    with (tmp_path / "killed.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.workflows.killed"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            yield Killer(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(30)


def test_killed_run_equals_uninterrupted_run(killer: Killer, tiny_base: Path, tmp_path: Path) -> None:
    pictures = fill_with_pictures(tmp_path / "pictures", count=6)

    def settings(run: Path) -> list[str]:
        return [
            "train",
            f"model.path={tiny_base}",
            "model.caption_dropout=0.2",
            "model.prior_share=0.3",
            "model.min_snr_gamma=5",
            f"data.path={pictures}",
            "data.flip=true",
            "adapter.parts=[unet, text_encoder]",
            "adapter.rank=4",
            "adapter.dropout=0.1",
            f"train.max_steps={NUM_STEPS}",
            "train.batch_size=2",
            "train.gradient_accumulation=2",
            "train.learning_rate=1e-2",
            "train.warmup_steps=5",
            "train.precision=fp32",
            "train.threads=1",
            "train.save_every_steps=7",
            "train.keep_checkpoints=2",
            "train.preview_every_steps=20",
            "preview.num_steps=2",
            f"cache.path={run}-cache",
            f"output.path={run}",
            "output.name=adapter",
            "output.formats=[kohya, peft]",
            "output.dtype=fp32",
        ]

    calm, killed = tmp_path / "calm", tmp_path / "killed"
    outcome = killer.run(settings(calm))
    assert outcome["code"] == 0, (tmp_path / "killed.log").read_text()

    work_s = sum(line["seconds"] for line in _metrics(calm))
    start_s = outcome["seconds"] - work_s
    num_random = NUM_KILLS - 4
    rng = random.Random(0)
    # Long enough to go on a little each time, and not so long that the run ends before its last kill.
    moments = [{"seconds": rng.uniform(0.05, start_s + work_s / (num_random + 2))} for _ in range(num_random)]
    writes = (
        ("killed/.part-*", "killed-cache/*/*/.part-*"),
        ("killed/checkpoints/.part-*", "killed/.part-*adapter.saf*"),
    )
    first, last = ([{"watch": tmp_path / pattern} for pattern in patterns] for patterns in writes)
    moments = [*first, *moments, *last]
    num_killed = 0
    for moment in moments:
        code = killer.run([*settings(killed), "--resume"], **moment)["code"]
        assert code in (0, -9), (tmp_path / "killed.log").read_text()
        num_killed += code == -9
    assert num_killed >= len(moments) - 1, "only the kill in the export may come too late"
    assert killer.run([*settings(killed), "--resume"])["code"] == 0, (tmp_path / "killed.log").read_text()

    _assert_equal(calm / "adapter.safetensors", killed / "adapter.safetensors")
    for part in ("unet", "text_encoder"):
        name = f"adapter.peft/{part}/adapter_model.safetensors"
        _assert_equal(calm / name, killed / name)
    ours, theirs = _metrics(killed), _metrics(calm)
    assert [line["step"] for line in ours] == list(range(1, NUM_STEPS + 1))
    timeless = [{k: v for k, v in line.items() if k != "seconds"} for line in ours]
    assert timeless == [{k: v for k, v in line.items() if k != "seconds"} for line in theirs]
    assert not list(killed.rglob(".part-*"))
    assert sorted(path.name for path in (killed / "previews").iterdir()) == sorted(
        path.name for path in (calm / "previews").iterdir()
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_equal(expected: Path, found: Path) -> None:
    one, other = load_file(expected), load_file(found)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
    assert any(tensor.any() for name, tensor in one.items() if "up" in name or "lora_B" in name)
