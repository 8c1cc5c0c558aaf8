"""Whole commands in this process, on the tiny base and a handful of images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from lora_diffusion.cli.main import main

ROOT = Path(__file__).parents[2]
SUBJECTS = ("cat", "dog", "heart", "face", "round cat", "red dog")
SIZES = ((16, 16), (16, 16), (24, 12), (16, 16), (12, 24), (16, 16))


@dataclass(frozen=True)
class Outcome:
    """What a command left on its streams."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """stderr in one line, as the console may have wrapped it."""
        return " ".join(self.err.split())


class Commands:
    """Runs `lora-diffusion ...` without starting a process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        self._capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # argparse
            code = int(exit_.code or 0)
        captured = self._capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    def good(self, *arguments: object) -> Outcome:
        """Runs a command that must succeed."""
        outcome = self(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome


class Killer:
    """Speaks to tests.workflows.killed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._in: IO[str] = process.stdin  # type: ignore[assignment]
        self._out: IO[str] = process.stdout  # type: ignore[assignment]

    def run(self, arguments: list[str], kill: tuple[str, int, float] | None = None, num_processes: int = 1) -> int:
        order = {"arguments": arguments, "kill": kill, "num_processes": num_processes}
        self._in.write(json.dumps(order) + "\n")
        self._in.flush()
        return int(json.loads(self._out.readline())["code"])


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


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


def fill_with_images(folder: Path, count: int = 4) -> Path:
    """Writes captioned noise of several shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index, (subject, (width, height)) in enumerate(zip(SUBJECTS[:count], SIZES, strict=False)):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a {subject}, sks style\nthe {subject} of sks style\n", encoding="utf-8")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill_with_images(tmp_path / "pictures")


@pytest.fixture(scope="session")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on UNet and text encoder, written in all formats in float32; shared, never changed."""
    return _trained(tiny_base, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained_unevenly(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with modules of different ranks and alphas."""
    settings = (
        "adapter.module_ranks=[unet/attn=8, text_encoder/ff=2, 're:.*to_k=3']",
        "adapter.module_alphas=[unet/ff=9]",
    )
    return _trained(tiny_base, tmp_path_factory.mktemp("trained_unevenly"), *settings)


def _trained(tiny_base: Path, root: Path, *more: str) -> Path:
    fill_with_images(root / "pictures")
    settings = [
        f"model.path={tiny_base}",
        f"data.path={root / 'pictures'}",
        "data.caption_lines=each",
        f"output.path={root / 'run'}",
        "output.formats=[kohya, diffusers, peft]",
        "output.dtype=fp32",
        "adapter.parts=[unet, text_encoder]",
        "adapter.targets=[attn, ff, unet/conv]",
        "adapter.rank=4",
        "adapter.alpha=3",
        "train.max_steps=8",
        "train.batch_size=2",
        "train.learning_rate=3e-2",
        "train.text_encoder_learning_rate=1e-2",
        "train.precision=fp32",
        "train.threads=1",
        "train.schedule=constant",
        *more,
    ]
    assert main(["train", *settings]) == 0
    return root / "run"
