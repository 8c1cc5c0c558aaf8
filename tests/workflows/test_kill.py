"""A run that is killed again and again ends with the very adapter of the run that never was.

LORA_DIFFUSION_KILLS sets the number of kills at random steps (3); four more aim at files being written.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.workflows.conftest import Killer, fill_with_images

NUM_STEPS = 60
NUM_KILLS = int(os.environ.get("LORA_DIFFUSION_KILLS", "3"))


def test_killed_run_equals_uninterrupted_run(killer: Killer, tiny_base: Path, tmp_path: Path) -> None:
    images = fill_with_images(tmp_path / "pictures", count=6)

    def settings(run: Path) -> list[str]:
        return [
            "train",
            f"model.path={tiny_base}",
            "model.caption_dropout=0.2",
            "model.prior_weight=0.5",
            "model.min_snr_gamma=5",
            f"data.path={images}",
            "data.caption_lines=each",
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
    log = tmp_path / "killed.log"
    assert killer.run(settings(calm)) == 0, log.read_text()

    num_killed = 0
    for moment in _moments(killed):
        code = killer.run([*settings(killed), "--resume"], moment)
        assert code in (0, -9), log.read_text()
        num_killed += code == -9
    assert num_killed >= NUM_KILLS  # those while a file is written may come too late
    assert killer.run([*settings(killed), "--resume"]) == 0, log.read_text()

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


def _moments(run: Path) -> list[tuple[str, int, float]]:
    """While the config, the cache, a checkpoint and the adapter are written, and at random steps between."""
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, NUM_STEPS - 8), NUM_KILLS))
    return [
        (f"{run}/.part-*", 0, 0.0),
        (f"{run}-cache/*/*/.part-*", 0, 0.0),
        *((f"{run}/metrics.jsonl", step, rng.uniform(0, 0.1)) for step in steps),
        (f"{run}/checkpoints/.part-*", 0, 0.0),
        (f"{run}/.part-*adapter.safetensors", 0, 0.0),
    ]


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_equal(expected: Path, found: Path) -> None:
    one, other = load_file(expected), load_file(found)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different
    assert any(tensor.any() for name, tensor in one.items() if "up" in name or "lora_B" in name)
