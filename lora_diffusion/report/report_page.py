"""The report page: what a run or an evaluation came to; `write_run_page` also serves the quickstart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from lora_diffusion.core.evidence import SampleLoss
from lora_diffusion.core.privacy import public, public_path, public_text
from lora_diffusion.core.version import __version__
from lora_diffusion.evaluation.results import Evaluation
from lora_diffusion.report import plots, sections
from lora_diffusion.report.page_data import write_beside
from lora_diffusion.report.rendering import Album, number, write_page
from lora_diffusion.report.sections import Findings, Shots

_MAX_TRAINING_IMAGES = 60
_ABOUT_LOSSES = (
    "The trained model predicted the noise in each image at the same noise levels, with its caption and "
    "without. Help is how much lower the loss is with the caption, as a share of the usual loss at that noise "
    "level: a caption that says what the image shows helps, one that is wrong does harm (below 0, marked), and "
    "an image that does not belong is helped little. Loss is 1 for the usual image; complex or odd ones are "
    "higher. Worst first: the order is by the worse of an image's two ranks, in help and in loss."
)


@dataclass(frozen=True)
class Training:
    """What is known of a training run."""

    metrics: Sequence[Mapping[str, float]] = ()
    """Lines of metrics.jsonl."""
    losses: Sequence[SampleLoss] = ()
    """Losses of the training images."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Setting -> value."""
    held_out: Sequence[Mapping[str, float]] = ()
    """Lines of progress.json of a base that writes text."""


def write_report(
    path: Path,
    *,
    title: str,
    findings: Findings | None = None,
    training: Training | None = None,
    chosen_file: str | None = None,
    next_commands: Sequence[str] = (),
) -> tuple[Path, ...]:
    """Writes the page, and the numbers beside it as JSON and, of an evaluation, as CSV; returns the files.

    Args:
        path: the HTML file.
        title: heading.
        findings: an evaluation; without one the page shows the training alone.
        training: the run, where there is one.
        chosen_file: the file of the chosen candidate.
        next_commands: command lines to try.

    Raises:
        ConfigError: a file that is no page's numbers is in the way of these.
    """
    training = training or Training()
    album = Album()
    shots = Shots(findings, album) if findings else None
    context = {
        "choice": sections.choice(findings, shots, chosen_file and Path(chosen_file).name)
        if findings and shots
        else None,
        "before_after": None,
        "caveats": public(findings.evaluation.warnings) if findings else (),
        "open_comparisons": sections.open_comparisons(findings) if findings else None,
        "candidates": sections.candidates(findings) if findings else None,
        "curves": sections.curves(findings) if findings else [],
        "grids": sections.grids(findings, shots) if findings and shots else [],
        "prompts": sections.prompts(findings, shots) if findings and shots else None,
        "training": training_section(training, album),
        "facts": {**training.facts, **(_facts(findings.evaluation) if findings else {}), "lora-diffusion": __version__},
        "hashes": _hashes(findings.evaluation) if findings else {},
        "next_commands": next_commands,
    }
    beside = _write_numbers(path, findings, training)
    subtitle = _subtitle(findings.evaluation) if findings else ""
    write_run_page(path, title, subtitle, album, context, beside)
    return (path, *beside)


def write_run_page(
    path: Path, title: str, subtitle: str, album: Album, context: Mapping[str, Any], beside: Sequence[Path]
) -> None:
    """Writes a page of the template of runs.

    Args:
        path: the HTML file.
        title: heading.
        subtitle: below it.
        album: holds the images.
        context: a value for each section; what is empty is left out.
        beside: files with the numbers of the page.
    """
    sections = {
        "choice": ("choice", "Choice"),
        "before_after": ("pictures", "Images"),
        "candidates": ("candidates", "Candidates"),
        "curves": ("curves", "Curves"),
        "grids": ("grid-1", "Images"),
        "prompts": ("prompts", "Prompts"),
        "training": ("training", "Training"),
        "facts": ("settings", "Settings"),
        "next_commands": ("next", "Next"),
    }
    write_page(
        path,
        "report.html.j2",
        album,
        {
            "title": title,
            "subtitle": subtitle,
            "version": __version__,
            "sections": dict(place for name, place in sections.items() if context[name]),
            "slider": ("base", "adapter"),
            "raw": [file.name for file in beside],
            **context,
            # A page may be shown to everybody.
            **{name: public(context[name]) for name in ("facts", "next_commands")},
        },
    )


def _subtitle(evaluation: Evaluation) -> str:
    scorer = ", ".join(f"{role} {name}" for role, name in evaluation.scorer.items())
    return (
        f"{len(evaluation.candidates)} candidates, {len(evaluation.cases)} prompts, {len(evaluation.seeds)} seeds on "
        f"{public_path(evaluation.base.source)}. Scored by {public_text(scorer)}; scores of other scorers cannot be "
        "compared."
    )


def _facts(evaluation: Evaluation) -> dict[str, str]:
    settings, size = evaluation.settings, evaluation.settings.size
    return {
        "base": f"{evaluation.base.source} ({evaluation.base.architecture})",
        "images": f"{settings.num_steps} steps, guidance {settings.guidance:g}, "
        f"{f'{size[0]}x{size[1]}' if size else 'size of the base'}"
        + (f", negative prompt {settings.negative!r}" if settings.negative else ""),
        "seeds": ", ".join(map(str, evaluation.seeds)),
        "scorers": ", ".join(f"{role}: {name}" for role, name in evaluation.scorer.items()),
        "references": f"{len(evaluation.references)} images",
        "training images": f"{len(evaluation.training_images)} images",
        "evaluated with": ", ".join(
            f"{package} {version}"
            for package, version in {"lora-diffusion": evaluation.lora_diffusion, **evaluation.versions}.items()
        ),
    }


def _hashes(evaluation: Evaluation) -> dict[str, str]:
    """Returns name -> hash of all files; images are called by their place below the folder that holds all of them."""
    hashes = {name: file.sha256 for name, file in evaluation.adapters.items()}
    groups = {"references": evaluation.references, "training": evaluation.training_images}
    for name, files in groups.items():
        root = os.path.commonpath([Path(file.path).parent for file in files]) if files else ""
        hashes |= {f"{name}/{os.path.relpath(file.path, root)}": file.sha256 for file in files}
    return public(hashes)  # type: ignore[no-any-return]


def training_section(training: Training, album: Album) -> dict[str, Any] | None:
    """Returns the section about the training; None if there is nothing to show."""
    if not training.metrics and not training.losses:
        return None
    return {
        "loss": plots.loss(training.metrics) if training.metrics else None,
        "held_out": plots.held_out(training.held_out) if training.held_out else None,
        "images": _losses(training.losses, album) if training.losses else None,
    }


def _losses(losses: Sequence[SampleLoss], album: Album) -> dict[str, Any]:
    """Returns the table of training images, worst first."""
    ranked = _worst_first(losses)
    rows = [
        {
            "key": sample.key,
            "caption": sample.caption,
            "help": number(sample.caption_help, "+"),
            "loss": f"{sample.loss:.2f}",
            "source": _thumbnail(sample, album),
            "mark": "chosen" if sample.caption_help < 0 else "",
        }
        for sample in ranked[:_MAX_TRAINING_IMAGES]
    ]
    left_out = len(ranked) - len(rows)
    return {"note": _ABOUT_LOSSES + (f" {left_out} more are in the numbers." if left_out else ""), "rows": rows}


def _worst_first(losses: Sequence[SampleLoss]) -> list[SampleLoss]:
    """Orders by the worse of two ranks, so that neither bad captions nor odd images hide behind the others."""
    indices = range(len(losses))
    in_help = _ranks(sorted(indices, key=lambda index: losses[index].caption_help))
    in_loss = _ranks(sorted(indices, key=lambda index: -losses[index].loss))
    order = sorted(indices, key=lambda index: (min(in_help[index], in_loss[index]), in_help[index]))
    return [losses[index] for index in order]


def _ranks(order: Sequence[int]) -> dict[int, int]:
    return {index: rank for rank, index in enumerate(order)}


def _thumbnail(sample: SampleLoss, album: Album) -> str | None:
    from lora_diffusion.data.images import ImageError, open_rgb

    try:
        image = open_rgb(Path(sample.path))
    except (ImageError, OSError, UnidentifiedImageError):
        return None
    image.thumbnail((144, 144))
    return album.add(f"training {sample.path}", image)


def _write_numbers(path: Path, findings: Findings | None, training: Training) -> tuple[Path, ...]:
    """Writes all that the page is made from as JSON, and the scores as CSV."""
    chosen = findings.choice if findings else None
    values = {
        "choice": chosen.to_json() if chosen else None,
        "evaluation": findings.evaluation.to_json() if findings else None,
        "training": {"facts": dict(training.facts), "losses": [vars(sample) for sample in training.losses]},
    }
    return write_beside(path, values, {path.with_suffix(".csv"): findings.evaluation} if findings else {})
