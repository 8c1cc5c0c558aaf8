"""Pictures from a base and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.config.rules import check_negative
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable
from lora_diffusion.core.samples import Request
from lora_diffusion.data.images import output_grid, save_image
from lora_diffusion.data.sample_types import IMAGES
from lora_diffusion.evaluation.images import save_output
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.device import pick_device
from lora_diffusion.workflows._steps import attach, find_family, read_adapter


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
        return f"{len(self.files)} picture(s) in {self.grid.parent}, all together in {self.grid}"


def generate(
    model: ModelOptions,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    adapters: Sequence[tuple[Path, float]],
    output_path: Path,
    negative: str = "",
    num_steps: int = 25,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> GeneratedImages:
    """Draws each prompt with each seed and writes the pictures and one grid.

    Args:
        model: the base.
        prompts: at least one.
        seeds: at least one; a seed gives the same starting noise as in diffusers.
        adapters: files or folders with their weights; all are applied at once.
        output_path: folder; pictures of the same name are replaced.
        negative: what the pictures should not show.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; None takes what suits the base.
        size: width and height in pixels.

    Raises:
        InputError: the base or an adapter file cannot be used.
    """
    family = find_family(model, IMAGES)
    info = family.check(model)
    if size and (size[0] % info.size_step or size[1] % info.size_step):
        raise ConfigError(
            f"--size {size[0]}x{size[1]}: both sides must be multiples of {info.size_step} for this base."
        )
    check_negative(negative, info.guidance if guidance is None else guidance)
    check_writable(output_path, "--output")
    use_threads("auto")
    states = [read_adapter(path, family, model) for path, _ in adapters]
    loaded = family.load(model, pick_device())
    weights = attach(loaded, states, [weight for _, weight in adapters])
    requests = [Request(p, s, negative, num_steps, guidance, size, weights or None) for p in prompts for s in seeds]
    outputs = family.generate(loaded, requests)
    files = tuple(save_output(output, output_path, index) for index, output in enumerate(outputs))
    grid_path = output_path / "grid.png"
    save_image(output_grid(outputs, seeds), grid_path)
    return GeneratedImages(files, grid_path)
