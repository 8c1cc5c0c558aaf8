"""Images from a base and adapters, in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.config.rules import check_generation, check_negative
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.files import check_writable
from lora_diffusion.core.samples import Request
from lora_diffusion.data.images import output_grid, save_image
from lora_diffusion.data.sample_types import IMAGES
from lora_diffusion.evaluation.images import save_output
from lora_diffusion.workflows.load import Model, check_model, check_size


@dataclass(frozen=True)
class GeneratedImages:
    """Files that `generate` wrote."""

    files: tuple[Path, ...]
    grid: Path

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"grid": str(self.grid), "pictures": list(map(str, self.files))}

    def text(self) -> str:
        """Returns lines for people."""
        return f"{len(self.files)} image(s) in {self.grid.parent}, all together in {self.grid}"


def generate(
    model: ModelOptions | Model,
    *,
    prompts: Sequence[str],
    output_path: Path,
    seeds: Sequence[int] = (0,),
    adapters: Sequence[tuple[Path, float]] = (),
    negative: str = "",
    num_steps: int = 25,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> GeneratedImages:
    """Generates each prompt with each seed, and writes the images and one grid.

    Args:
        model: the base, or one that is loaded.
        prompts: at least one.
        output_path: folder; images of the same name are replaced.
        seeds: at least one; a seed gives the same starting noise as in diffusers.
        adapters: files or folders with their weights; all are applied at once.
        negative: what the images should not show.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; None takes what suits the base.
        size: width and height in pixels.

    Raises:
        InputError: the base or an adapter file cannot be used.
    """
    check_generation(prompts, seeds, negative, num_steps, guidance)
    checked = check_model(model, adapters, IMAGES)
    check_size(size, checked.info)
    check_negative(negative, checked.info.guidance if guidance is None else guidance)
    check_writable(output_path, "--output")
    requests = [Request(prompt, seed, negative, num_steps, guidance, size) for prompt in prompts for seed in seeds]
    outputs = checked.load().answer(requests)
    files = tuple(save_output(output, output_path, index) for index, output in enumerate(outputs))
    grid_path = output_path / "grid.png"
    save_image(output_grid(outputs, seeds), grid_path)
    return GeneratedImages(files, grid_path)
