"""Plots as SVG elements that take their colours from the page, so that they suit light, dark and paper."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SERIES = 6
"""Number of colours for lines; more lines than that look alike."""
_MAX_POINTS = 400
_SMOOTHING = 0.95
_LABEL_WIDTH, _LABEL_HEIGHT = 0.17, 0.055
"""Space of a label in the frontier plot, as shares of its sides."""
# Placeholders that matplotlib writes as they are, and that the page's style sheet then gives a colour.
_INK, _MUTED, _LINE, _GROUND = "#010101", "#020202", "#030303", "#040404"
_COLOURS = tuple(f"#0a0a{index:02x}" for index in range(1, SERIES + 1))
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _LINE: "--line", _GROUND: "--ground"} | {
    colour: f"--series-{index}" for index, colour in enumerate(_COLOURS, 1)
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot with its 95 % band."""

    label: str
    xs: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True)
class Point:
    """One candidate in the plane of likeness and text alignment."""

    name: str
    text: float
    likeness: float
    rank: str
    """chosen, frontier, beaten, broken or base."""
    label: str = ""


_MARKERS: Mapping[str, Mapping[str, Any]] = {
    "broken": {"marker": "x", "color": _MUTED, "s": 26, "linewidths": 1.2},
    "beaten": {"marker": "o", "facecolors": _GROUND, "edgecolors": _MUTED, "s": 22, "linewidths": 1.0},
    "frontier": {"marker": "o", "color": _COLOURS[0], "s": 34},
    "base": {"marker": "D", "color": _INK, "s": 34},
    "chosen": {"marker": "*", "color": _COLOURS[1], "s": 210, "edgecolors": _GROUND, "linewidths": 0.8},
}
"""Rank of a point -> its marker, put on in this order, the most important on top."""


def frontier(points: Sequence[Point], labels: tuple[str, str], real: float | None) -> str:
    """Returns all candidates in the plane of text alignment (across) and likeness (up).

    Args:
        points: candidates and the base.
        labels: of the two axes, across and up.
        real: likeness of the real images, shown as a line.
    """
    figure, axes = _figure(5.2, 3.9)
    top = sorted((point.text, point.likeness) for point in points if point.rank in ("frontier", "chosen"))
    axes.plot(*zip(*top, strict=True), color=_COLOURS[0], linewidth=1.2, alpha=0.7)
    if real is not None:
        axes.axhline(real, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("real images", (0.01, real), xycoords=("axes fraction", "data"), **_note(3, 3))
    for rank, marker in _MARKERS.items():
        group = [point for point in points if point.rank == rank]
        if group:
            axes.scatter([p.text for p in group], [p.likeness for p in group], **marker, zorder=3)
    right = max(point.text for point in points)
    left = min(point.text for point in points)
    for point in _spaced(points, real):
        at_edge = point.text > right - _LABEL_WIDTH * (right - left)
        side = {"ha": "right", **_note(-7, 5)} if at_edge else _note(7, 5)
        axes.annotate(point.label, (point.text, point.likeness), **side)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.margins(0.08, 0.1)
    return _svg(figure, "frontier", f"{len(points)} candidates by {labels[0]} and {labels[1]}.")


def _spaced(points: Sequence[Point], real: float | None) -> list[Point]:
    """Returns the labelled points whose labels do not lie on each other; the chosen one and the base go first."""
    width = max(p.text for p in points) - min(p.text for p in points) or 1
    levels = [*(p.likeness for p in points), *([] if real is None else [real])]
    height = max(levels) - min(levels) or 1
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: p.rank not in ("chosen", "base")):
        near = (
            abs(point.text - other.text) / width < _LABEL_WIDTH
            and abs(point.likeness - other.likeness) / height < _LABEL_HEIGHT
            for other in kept
        )
        if point.label and not any(near):
            kept.append(point)
    return kept


def curves(name: str, across: str, lines: Sequence[Curve], marks: Mapping[str, float]) -> str:
    """Returns a small plot of one metric.

    Args:
        name: of the metric, its heading and the label for screen readers.
        across: label of the horizontal axis.
        lines: at most SERIES.
        marks: label -> level of horizontal lines, such as the base's.
    """
    figure, axes = _figure(3.6, 2.5, has_label=False)
    for label, level in marks.items():
        axes.axhline(level, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(label, (0.995, level), xycoords=("axes fraction", "data"), ha="right", **_note(0, 2.5))
    for line, colour in zip(lines, _COLOURS, strict=False):
        axes.fill_between(line.xs, line.lows, line.highs, color=colour, alpha=0.13, linewidth=0)
        axes.plot(line.xs, line.means, color=colour, linewidth=1.7, marker="o", markersize=3)
    axes.set_title(name, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel(across)
    return _svg(figure, f"{name} {across}", f"{name} against {across}, {len(lines)} lines.")


def loss(metrics: Sequence[Mapping[str, float]]) -> str:
    """Returns the loss of the steps and its running mean.

    Args:
        metrics: lines of metrics.jsonl with step and loss, at least one.
    """
    steps, losses = np.array([line["step"] for line in metrics]), np.array([line["loss"] for line in metrics])
    smooth, mean = [], losses[0]
    for value in losses:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smooth.append(mean)
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MAX_POINTS)).round().astype(int))
    figure, axes = _figure(5.2, 2.6)
    axes.plot(steps[kept], losses[kept], color=_LINE, linewidth=0.9)
    axes.plot(steps[kept], np.array(smooth)[kept], color=_COLOURS[0], linewidth=1.9)
    # Single steps with little noise reach far above the rest and would flatten the curve.
    axes.set_ylim(0, max(float(np.quantile(values, 0.98)) for values in (losses, smooth)) * 1.15 or 1)
    axes.set(xlabel="step", ylabel="loss")
    return _svg(figure, "loss", f"Loss of {len(steps)} steps and its running mean, which ends at {smooth[-1]:.4f}.")


def held_out(scores: Sequence[Mapping[str, float]]) -> str:
    """Returns each score of held-out samples over the steps, each as a share of its largest value.

    Args:
        scores: lines of progress.json with step, score, and what was measured; at least one.
    """
    steps = [line["step"] for line in scores]
    names = [name for name in scores[-1] if name not in ("step", "score")][:SERIES]
    best = max(scores, key=lambda line: line["score"])
    figure, axes = _figure(5.2, 2.6)
    for name, colour in zip(names, _COLOURS, strict=False):
        values = np.array([line.get(name, np.nan) for line in scores])
        axes.plot(steps, values / (np.nanmax(np.abs(values)) or 1), color=colour, linewidth=1.6, marker=".", label=name)
    axes.axvline(best["step"], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    axes.set(xlabel="step", ylabel="share of the largest")
    best_scores = ", ".join(f"{name} {best[name]:.4f}" for name in names if name in best)
    return _svg(figure, "held out", f"Scores of held-out samples; the best step is {best['step']} with {best_scores}.")


def _note(right: float, up: float) -> dict[str, Any]:
    return {"xytext": (right, up), "textcoords": "offset points", "fontsize": 8, "color": _MUTED}


def _figure(width: float, height: float, *, has_label: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.patch.set_alpha(0)
    # Fixed margins: letting matplotlib fit them takes longer than all else on a page.
    left, bottom, right, top = (0.72 if has_label else 0.56), 0.45, 0.1, 0.28
    axes: Any = figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )
    axes.patch.set_alpha(0)
    axes.grid(color=_LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_MUTED, length=0, labelsize=9)
    axes.xaxis.label.set_color(_MUTED)
    axes.yaxis.label.set_color(_MUTED)
    return figure, axes


def _svg(figure: Any, name: str, description: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Text stays text, in the font of the page. The salt keeps the names of two plots of a page apart.
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9.5}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r' id="(figure|axes|patch|text|line2d|matplotlib|xtick|ytick|PathCollection|FillBet\w+)[\w.]*"', "", svg
    )
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"<defs>\s*<style.*?</defs>\s*", "", svg, count=1, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r"\1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
