"""The whole way on the built-in Stable Diffusion: train a style, generate before and after, score, report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.load import find_shipped, load
from lora_diffusion.config.schema import Config
from lora_diffusion.core.files import shipped_path, write_json
from lora_diffusion.core.samples import Request
from lora_diffusion.data.images import save_image
from lora_diffusion.report.quickstart_page import write_quickstart_page
from lora_diffusion.workflows.evaluate import compare_with_base
from lora_diffusion.workflows.report import read_training
from lora_diffusion.workflows.train import TrainResult, train

_NUM_GRID_ROWS = 8


@dataclass(frozen=True)
class QuickstartResult:
    """What the quickstart left."""

    adapter: Path
    grid: Path
    report: Path
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    next_commands: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        files = {"adapter": str(self.adapter), "grid": str(self.grid), "report": str(self.report)}
        return {**files, "scores": self.scores, "next": list(self.next_commands), "seconds": round(self.seconds, 1)}

    def text(self) -> str:
        """Returns lines for people."""
        lines = [
            f"Done in {self.seconds:.0f} s.",
            f"  adapter  {self.adapter}",
            f"  grid     {self.grid}",
            f"  report   {self.report}",
            "How much the images look like the style (CLIP image, 0 to 1):",
            *(f"  {label:<26}{scores['clip_image']['mean']:.3f}" for label, scores in self.scores.items()),
            "Try next:",
            *(f"  {command}" for command in self.next_commands),
        ]
        return "\n".join(lines)


def quickstart(output_path: Path, *, resume: bool = False, overwrite: bool = False) -> QuickstartResult:
    """Trains the blob style on the built-in base and shows what it changed on faces that were not trained on.

    Raises:
        ConfigError: the folder holds another run, and neither `resume` nor `overwrite` is set.
    """
    started = time.perf_counter()
    data = shipped_path("datasets") / "blob-style"
    config = load(find_shipped("sd1/style"), [f"data.path={data / 'train'}", f"output.path={output_path}"])
    trained = train(config, resume=resume, overwrite=overwrite)
    comparison = compare_with_base(config, trained.files[0], data / "references", Request("", 0))
    grid_path = output_path / "before-after.png"
    save_image(comparison.sheet(range(_NUM_GRID_ROWS)), grid_path)
    write_json(output_path / "scores.json", {"scorer": comparison.scorer, "scores": comparison.to_json()})
    report_path = output_path / "report.html"
    commands = _next_commands(config, trained.files[0])
    seconds = time.perf_counter() - started
    write_quickstart_page(
        report_path,
        title="lora-diffusion quickstart: blob style",
        comparison=comparison,
        num_rows=_NUM_GRID_ROWS,
        training=replace(read_training(output_path), facts=_facts(config, trained, seconds)),
        next_commands=commands,
    )
    return QuickstartResult(trained.files[0], grid_path, report_path, comparison.to_json(), commands, seconds)


def _next_commands(config: Config, adapter: Path) -> tuple[str, ...]:
    run, file = shlex.quote(config.output.path), shlex.quote(str(adapter))
    return (
        f"lora-diffusion generate --model {config.model.path} --adapter {file}:0.7 "
        f"--prompt 'a blob style cat' --prompt 'a cat' --seed 1 --seed 2 --output {run}/more",
        f"lora-diffusion inspect {file}",
        "lora-diffusion train --config sd1/style data.path=YOUR_PICTURES output.path=my-style",
    )


def _facts(config: Config, trained: TrainResult, seconds: float) -> dict[str, str]:
    return {
        "base": config.model.path,
        "images": config.data.path,
        "adapter": f"{config.adapter.variant}, rank {config.adapter.rank}, on {', '.join(config.adapter.parts)}",
        "training": f"{trained.num_steps} steps of {config.train.batch_size} images",
        "whole quickstart": f"{seconds:.0f} s",
    }
