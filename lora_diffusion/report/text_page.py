"""The page that shows what a model writes before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion import __version__
from lora_diffusion.core.privacy import public
from lora_diffusion.report import plots
from lora_diffusion.report.page import Album, Shot, write_page
from lora_diffusion.report.pages import Training
from lora_diffusion.report.sections import columns, row


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
    pictures: Sequence[Path] = ()
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
    for picture in page.pictures:
        album.add(str(picture), picture)
    write_page(
        path,
        "texts.html.j2",
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
            "pictures": [Shot(str(picture), "", f"Picture {picture.stem}") for picture in page.pictures],
            "about_examples": page.about_examples,
            "loss": plots.loss(training.metrics),
            "facts": public({**training.facts, "lora-diffusion": __version__}),
            "next_commands": public(next_commands),
        },
    )
