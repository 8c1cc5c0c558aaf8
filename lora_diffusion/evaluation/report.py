"""The page that shows a run: what it draws before and after, its scores, its loss."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lora_diffusion.core.files import write_text
from lora_diffusion.evaluation.before_after import Comparison

_SMOOTHING = 0.95


def write_report(
    path: Path,
    *,
    title: str,
    comparison: Comparison,
    grid: Image,
    metrics: Sequence[Mapping[str, float]],
    facts: Mapping[str, str],
    next_commands: Sequence[str],
) -> None:
    """Writes one HTML file that needs no other file and no network.

    Args:
        path: the HTML file.
        title: heading.
        comparison: scores of all conditions.
        grid: before/after pictures.
        metrics: the lines of metrics.jsonl.
        facts: label -> value, shown as a table.
        next_commands: command lines to try.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(
        files(__package__).joinpath("report.html.j2").read_text("utf-8")
    )
    html = template.render(
        title=title,
        rows=[*comparison.rows, comparison.real],
        scorer=comparison.scorer,
        num_pictures=len(comparison.prompts),
        grid=_data_url(grid),
        loss_curve=_loss_curve(metrics),
        facts=facts,
        next_commands=next_commands,
    )
    write_text(path, html)


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _loss_curve(metrics: Sequence[Mapping[str, float]]) -> str:
    """Returns the loss of each step and its running mean as an SVG element."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [line["step"] for line in metrics]
    losses = [line["loss"] for line in metrics]
    smooth: list[float] = []
    for loss in losses:
        smooth.append(loss if not smooth else _SMOOTHING * smooth[-1] + (1 - _SMOOTHING) * loss)
    with mpl.rc_context({"svg.hashsalt": "lora-diffusion", "font.size": 9}):
        figure = Figure(figsize=(7.5, 2.8), layout="constrained")
        axes: Any = figure.subplots()
        axes.plot(steps, losses, color="#bbb", linewidth=0.7, label="each step")
        axes.plot(steps, smooth, color="#2563eb", linewidth=1.6, label="running mean")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
