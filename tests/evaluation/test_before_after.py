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
from lora_diffusion.evaluation import before_after
from lora_diffusion.evaluation.before_after import WITH_ADAPTER, WITH_BASE, WITHOUT_ADAPTER, Case
from lora_diffusion.evaluation.images import save_output


class ColourClip:
    """Sees the mean colour of a picture, and the colour word of a text."""

    name = "colour"
    words: ClassVar = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]).float()
        return torch.nn.functional.normalize(pixels, dim=1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([next(rgb for word, rgb in self.words.items() if word in text) for text in texts])


def draw(requests: Sequence[Request]) -> list[Output]:
    """The base draws blue; the adapter turns it red, but only for its trigger."""
    return [
        Output(r, Image.new("RGB", (8, 8), "red" if "zwx" in r.prompt and (r.weights or {})["a"] else "blue"))
        for r in requests
    ]


@pytest.fixture
def comparison() -> before_after.Comparison:
    cases = [Case("a zwx cat", "a cat", "red"), Case("zwx dog", "dog", "red")]
    references = [Image.new("RGB", (8, 8), "red")] * 3
    return before_after.compare(draw, ColourClip(), cases, references, "a", Request("", 0), seeds=(0, 1))  # type: ignore[arg-type]


def test_scores_show_what_the_adapter_changed_and_where(comparison: before_after.Comparison) -> None:
    for metric in ("clip_image", "clip_text"):
        means = {row.label: row.scores[metric].mean for row in comparison.rows}
        assert means[WITH_ADAPTER] == pytest.approx(1)
        assert means[WITH_BASE] == means[WITHOUT_ADAPTER] == pytest.approx(0)
    assert comparison.real.scores["clip_image"].mean == pytest.approx(1)
    assert comparison.prompts == ("a zwx cat", "a zwx cat", "zwx dog", "zwx dog")
    assert len(comparison.row(WITH_BASE).images) == 4


def test_grid_enlarges_small_pictures_and_labels_them() -> None:
    sheet = grid([[Image.new("RGB", (64, 64), "red")] * 2] * 3, ["a", "b", "c"], ["left", "right"])
    assert sheet.size == (150 + 2 * 128, 28 + 3 * 128)
    assert sheet.getpixel((150 + 64, 28 + 64)) == (255, 0, 0)


def test_picture_files_carry_their_settings(tmp_path: Path) -> None:
    request = Request("A cat / dog!", 7, negative="blur", num_steps=3, guidance=2.5)
    path = save_output(Output(request, Image.new("RGB", (8, 16))), tmp_path, 4)
    assert path.name == "004-a-cat-dog-seed7.png"
    text = Image.open(path).text["parameters"]  # type: ignore[attr-defined]
    assert text == "A cat / dog!\nNegative prompt: blur\nSteps: 3, CFG scale: 2.5, Seed: 7, Size: 8x16"
