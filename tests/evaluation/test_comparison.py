from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.core.samples import Output, Request
from lora_diffusion.data.images import grid
from lora_diffusion.evaluation.harness import (
    WITH_ADAPTER,
    WITH_BASE,
    WITHOUT_ADAPTER,
    Comparison,
    PromptGrid,
    compare_conditions,
)
from lora_diffusion.evaluation.images import save_output
from lora_diffusion.evaluation.results import Case
from lora_diffusion.scoring.scorers import Scorers


class ColourClip:
    """Sees the mean colour of an image, and the colour word of a text."""

    name = "colour"
    words: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]).float()
        return torch.nn.functional.normalize(pixels, dim=1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([next(rgb for word, rgb in self.words.items() if word in text) for text in texts])


def generate(requests: Sequence[Request]) -> list[Output]:
    """The base makes blue images; the adapter turns them red, but only for its trigger."""
    return [
        Output(r, Image.new("RGB", (8, 8), "red" if "zwx" in r.prompt and (r.weights or {})["a"] else "blue"))
        for r in requests
    ]


GRID = PromptGrid(
    [
        Case(i, prompt, prompt.replace("zwx ", ""), "red", "subject", "s")
        for i, prompt in enumerate(("a zwx cat", "zwx dog"))
    ],
    (0, 1),
    Request("", 0),
)


def colour_scorers() -> Scorers:
    return Scorers({"clip": "colour"}, models={"clip": ColourClip()})


@pytest.fixture
def comparison() -> Comparison:
    references = [Image.new("RGB", (8, 8), "red") for _ in range(3)]
    return compare_conditions(GRID, generate, "a", colour_scorers(), references)


def test_scores_show_what_the_adapter_changed_and_where(comparison: Comparison) -> None:
    for metric in ("clip_image", "clip_text"):
        means = {condition.label: condition.scores[metric].mean for condition in comparison.conditions}
        assert means[WITH_ADAPTER] == pytest.approx(1)
        assert means[WITH_BASE] == means[WITHOUT_ADAPTER] == pytest.approx(0)
    assert comparison.references.scores["clip_image"].mean == pytest.approx(1)
    assert comparison.grid.prompts() == ["a zwx cat", "a zwx cat", "zwx dog", "zwx dog"]
    assert [request.seed for request in comparison.grid.requests()] == [0, 1, 0, 1]
    assert len(comparison.condition(WITH_BASE).images) == 4


def test_sheet_has_a_row_for_each_prompt_and_a_column_for_each_condition(comparison: Comparison) -> None:
    assert comparison.sheet([0, 2]).size == (150 + 4 * 128, 28 + 2 * 128)


def test_grid_enlarges_small_images_and_labels_them() -> None:
    sheet = grid([[Image.new("RGB", (64, 64), "red")] * 2] * 3, ["a", "b", "c"], ["left", "right"])
    assert sheet.size == (150 + 2 * 128, 28 + 3 * 128)
    assert sheet.getpixel((150 + 64, 28 + 64)) == (255, 0, 0)


def test_image_files_carry_their_settings(tmp_path: Path) -> None:
    request = Request("A cat / dog!", 7, negative="blur", num_steps=3, guidance=2.5)
    path = save_output(Output(request, Image.new("RGB", (8, 16))), tmp_path, 4)
    assert path.name == "004-a-cat-dog-seed7.png"
    text = Image.open(path).text["parameters"]  # type: ignore[attr-defined]
    assert text == "A cat / dog!\nNegative prompt: blur\nSteps: 3, CFG scale: 2.5, Seed: 7, Size: 8x16"
