"""Laws of generated images: they depend on prompt, seed and adapter weights, and on nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny import save_tiny_sdxl_pipeline
from tests.workflows.conftest import Commands

STEPS = ("--steps", "2", "--guidance", "3")


class Drawing:
    """`lora-diffusion generate` on the tiny base."""

    def __init__(self, command: Commands, base: Path, folder: Path) -> None:
        self._command, self._base, self._folder, self._count = command, base, folder, 0

    def __call__(self, *arguments: object) -> list[np.ndarray]:
        self._count += 1
        output = self._folder / f"drawn {self._count}"
        outcome = self._command.good(
            "generate", "--model", self._base, "--output", output, "--json", *STEPS, *arguments
        )
        result = json.loads(outcome.out)
        assert Path(result["grid"]) == output / "grid.png"
        assert Path(result["grid"]).is_file()
        return [np.asarray(Image.open(path)) for path in result["pictures"]]


@pytest.fixture
def draw(command: Commands, tiny_base: Path, tmp_path: Path) -> Drawing:
    return Drawing(command, tiny_base, tmp_path)


def test_seed_and_prompt_decide_whatever_else_is_in_the_batch(draw: Drawing) -> None:
    table = draw("--prompt", "a cat", "--prompt", "a red dog", "--seed", 1, "--seed", 2, "--seed", 3)
    assert len(table) == 6
    assert len({image.tobytes() for image in table}) == 6
    (alone,) = draw("--prompt", "a red dog", "--seed", 2)
    # One level of 255: a batch of another size is summed in another order.
    assert np.abs(alone.astype(int) - table[4]).max() <= 1


def test_adapters_by_weight(draw: Drawing, trained: Path) -> None:
    kohya, peft = trained / "run.safetensors", trained / "run.peft"
    prompt = ("--prompt", "a cat, sks style", "--seed", 5)
    (base,) = draw(*prompt)
    (first,) = draw(*prompt, "--adapter", kohya)
    assert np.abs(first.astype(int) - base).max() > 5
    (off,) = draw(*prompt, "--adapter", f"{kohya}:0")
    assert np.array_equal(off, base)
    (pair,) = draw(*prompt, "--adapter", kohya, "--adapter", f"{peft}:0")
    assert np.array_equal(pair, first)
    (half,) = draw(*prompt, "--adapter", f"{kohya}:0.5", "--adapter", f"{peft}:.5")
    assert np.abs(half.astype(int) - first).max() <= 1
    (away,) = draw(*prompt, "--adapter", kohya, "--adapter", f"{peft}:-1")
    assert np.abs(away.astype(int) - base).max() <= 1


def test_size_and_empty_prompt(draw: Drawing) -> None:
    (image,) = draw("--prompt", "", "--size", "24x12")
    assert image.shape == (12, 24, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--guidance", 1, "--negative", "red"], "--negative does nothing at --guidance 1"),
        (["--prompt", "caf\udce9"], r"'caf\udce9' is not UTF-8"),
        (["--steps", 1000], "--steps 1000: must be from 1 to 999"),
    ],
)
def test_bad_settings(command: Commands, tmp_path: Path, arguments: list[object], message: str) -> None:
    output = tmp_path / "out"
    outcome = command("generate", "--model", "/none", "--prompt", "a cat", "--output", output, *arguments)
    assert outcome.code == 2
    assert message in outcome.message


def test_settings_are_in_the_file(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    command.good("generate", "--model", tiny_base, "--prompt", "a cat", "--seed", 9, "--output", tmp_path, *STEPS)
    (path,) = tmp_path.glob("000-*.png")
    text = Image.open(path).text["parameters"]
    assert "a cat" in text
    assert "Seed: 9" in text


def test_base_of_a_run(command: Commands, trained: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "a cat", "--output", tmp_path, *STEPS)
    command.good("generate", "--config", trained / "config.yaml", *arguments)
    assert (tmp_path / "grid.png").is_file()


def test_base_that_has_the_fp16_files_only(command: Commands, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    for path in list(base.rglob("*.safetensors")):
        path.rename(path.with_suffix(".fp16.safetensors"))
    images = []
    for number, model in enumerate((tiny_base, base)):
        output = tmp_path / str(number)
        command.good("generate", "--model", model, "--prompt", "a cat", "--output", output, *STEPS)
        images.append((output / "grid.png").read_bytes())
    assert images[0] == images[1]


def test_family_of_the_base_is_found(command: Commands, tmp_path: Path) -> None:
    base = save_tiny_sdxl_pipeline(tmp_path / "base")
    command.good("generate", "--model", base, "--prompt", "a cat", "--output", tmp_path / "out", *STEPS)
    assert list((tmp_path / "out").glob("000-*.png"))
