"""What previews leave in the run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_diffusion.config.schema import PreviewConfig
from lora_diffusion.core.files import write_text
from lora_diffusion.core.samples import AudioText, Chat, ImageText, Output, Sample
from lora_diffusion.evaluation.images import save_image
from lora_diffusion.workflows._steps import prompt_grid


def _save_grid(outputs: Sequence[Output], config: PreviewConfig, path: Path) -> None:
    save_image(prompt_grid(outputs, config.seeds), path.with_suffix(".png"))


def _save_texts(outputs: Sequence[Output], config: PreviewConfig, path: Path) -> None:
    del config
    asked = [(output, output.request.sample) for output in outputs]
    lines = [f"{sample.key if sample else ''}\t{output.request.prompt}\t{output.text}\n" for output, sample in asked]
    write_text(path.with_suffix(".tsv"), "".join(lines))


SAVERS: Mapping[type[Sample], Callable[[Sequence[Output], PreviewConfig, Path], None]] = {
    ImageText: _save_grid,
    AudioText: _save_texts,
    Chat: _save_texts,
}
"""A family's `sample_type` -> writes the previews of a step to a path, which it gives an ending."""
