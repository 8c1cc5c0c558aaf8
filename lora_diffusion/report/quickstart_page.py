"""The pages of the quickstart: images or texts before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.core.privacy import public
from lora_diffusion.core.version import __version__
from lora_diffusion.evaluation.harness import WITH_ADAPTER, Comparison
from lora_diffusion.report import plots
from lora_diffusion.report.rendering import Album, Shot, write_page
from lora_diffusion.report.report_page import Training, training_section, write_run_page
from lora_diffusion.report.sections import columns, label, row

_ABOUT_SCORES = (
    "Means over {} images with 95 % intervals. Likeness is the mean cosine with held-out images, text "
    "alignment the cosine with the subject's words. The scorer is {}, which is not the text encoder of the base: "
    "a model must not mark its own work. Scores of different scorers cannot be compared."
)


@dataclass(frozen=True)
class TextPage:
    """What the page says; the name of a column that holds numbers ends in #."""

    title: str
    subtitle: str
    score_names: Sequence[str]
    scores: Sequence[Sequence[Any]]
    about: str
    """What the scores are."""
    example_names: Sequence[str]
    examples: Sequence[Sequence[Any]]
    about_examples: str
    """How the examples were chosen."""
    images: Sequence[Path] = ()
    """What each example is about; none where there is nothing to see."""


def write_text_page(path: Path, page: TextPage, *, training: Training, next_commands: Sequence[str]) -> None:
    """Writes one HTML file that needs no other file and no network.

    Args:
        path: the HTML file.
        page: scores and examples.
        training: the run.
        next_commands: command lines to try.
    """
    album = Album()
    for image in page.images:
        album.add(str(image), image)
    write_page(
        path,
        "text_quickstart.html.j2",
        album,
        {
            "title": page.title,
            "subtitle": page.subtitle,
            "version": __version__,
            "sections": {
                "scores": "Scores",
                "examples": "Examples",
                "training": "Training",
                "settings": "Settings",
                "next": "Next",
            },
            "slider": ("", ""),
            "raw": [],
            "score_columns": columns(*page.score_names),
            "scores": [row(cells) for cells in page.scores],
            "about": page.about,
            "example_names": page.example_names,
            "examples": page.examples,
            "images": [Shot(str(image), "", f"Image {image.stem}") for image in page.images],
            "about_examples": page.about_examples,
            "loss": plots.loss(training.metrics),
            "facts": public({**training.facts, "lora-diffusion": __version__}),
            "next_commands": public(next_commands),
        },
    )


def write_quickstart_page(
    path: Path,
    *,
    title: str,
    comparison: Comparison,
    num_rows: int,
    training: Training,
    next_commands: Sequence[str],
) -> None:
    """Writes the short page of one adapter against the base, with the trigger words and without.

    Args:
        path: the HTML file.
        title: heading.
        comparison: images and scores of all conditions.
        num_rows: prompts that are shown.
        training: the run.
        next_commands: command lines to try.
    """
    album = Album()
    context = {
        "choice": None,
        "before_after": _before_after(comparison, num_rows, album),
        "caveats": (),
        "open_comparisons": None,
        "candidates": None,
        "curves": [],
        "grids": [],
        "prompts": None,
        "training": training_section(training, album),
        "facts": {**training.facts, "lora-diffusion": __version__},
        "hashes": {},
        "next_commands": next_commands,
    }
    write_run_page(path, title, "Same prompts, same noise, before and after training.", album, context, ())


def _before_after(comparison: Comparison, num_rows: int, album: Album) -> dict[str, Any]:
    rows = []
    pairs = list(zip(comparison.grid.prompts(), comparison.grid.prompts(control=True), strict=True))
    for index, (prompt, control) in enumerate(pairs[:num_rows]):
        shots = []
        for condition in comparison.conditions:
            is_with = condition.label.endswith("with trigger")
            text = prompt if is_with else control
            role = "base" if condition.label.startswith("base") else "chosen" if condition.label == WITH_ADAPTER else ""
            key = album.add(f"{condition.label} {index}", condition.images[index])
            shots.append(Shot(key, condition.label, f"{text}: {condition.label}", f"{index}:{is_with}", role))
        rows.append({"prompt": prompt, "about": f"without trigger: {control}", "shots": shots})
    metrics = list(comparison.conditions[0].scores)
    scores = [
        row(
            [condition.label, *(str(condition.scores.get(metric, "")) for metric in metrics)],
            "chosen" if condition.label == WITH_ADAPTER else "",
        )
        for condition in (*comparison.conditions, comparison.references)
    ]
    return {
        "note": "Each row is one subject from the same noise. None of these subjects was in the training images. "
        "Open an image to slide between the base and the adapter.",
        "rows": rows,
        "columns": columns("images", *(f"{label(metric)}#" for metric in metrics)),
        "scores": scores,
        "about_scores": _ABOUT_SCORES.format(len(pairs), comparison.scorer),
    }
