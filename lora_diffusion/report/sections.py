"""The sections of a report that show one evaluation, as the values that the templates ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.evaluation.results import BASE, REAL, Candidate, Case, Evaluation, Table
from lora_diffusion.evaluation.select import TEXT, CandidateScore, Choice
from lora_diffusion.evaluation.statistics import Interval
from lora_diffusion.report import plots
from lora_diffusion.report.rendering import Album, Shot, number

_MAX_CONCEPT, _MAX_CONTROL = 12, 6
"""Prompts whose images a page shows; all others lie in the evaluation's folder."""
_NUM_HERO = 4
_MANY_IMAGES = 10_000
"""From here on, a guess of how many images it takes says no more."""
_NUM_EXTREME = 4
_LABELS: Mapping[str, str] = {
    "clip_text": "text alignment (CLIP)",
    "clip_score": "CLIPScore",
    "match": "likeness to the same subject",
    "clip_image": "likeness (CLIP)",
    "clip_image_max": "nearest reference (CLIP)",
    "dino_image": "likeness (DINO)",
    "vendi": "Vendi score",
}


def label(metric: str) -> str:
    """Returns a metric's name for people."""
    return _LABELS.get(metric, metric.replace("_", " "))


@dataclass(frozen=True)
class Findings:
    """One evaluation, made ready to be shown."""

    evaluation: Evaluation
    folder: Path
    """Where its images are."""
    choice: Choice | None
    """None where the evaluation does not allow one."""
    table: Table

    @property
    def shown(self) -> Candidate:
        """The candidate that the page is about: the chosen one, else the last at the weight nearest to 1."""
        if self.choice:
            return self.choice.candidate
        return min(reversed(self.evaluation.candidates), key=lambda candidate: abs(candidate.weight - 1))

    @property
    def seed(self) -> int:
        """The seed of the image grids."""
        return self.evaluation.seeds[0]

    def concept_cases(self) -> list[Case]:
        """Returns the cases that ask for what was trained."""
        return [case for case in self.evaluation.cases if not case.is_control]

    def images(self) -> dict[tuple[str, int | None, int | None], str]:
        """Returns (candidate, case, seed) -> path in the folder."""
        return {(s.candidate, s.case, s.seed): s.image for s in self.evaluation.scores if s.image}


class Shots:
    """Makes the shots of an evaluation's images."""

    def __init__(self, findings: Findings, album: Album) -> None:
        """Looks the images up once."""
        self._findings, self._album, self._images = findings, album, findings.images()

    def find(self, candidate: str, case: Case, seed: int | None, text: str) -> Shot | None:
        """Returns the shot of an image, or None if it is not there."""
        name = self._images.get((candidate, case.index, seed))
        path = self._findings.folder / name if name else None
        if path is None or not path.is_file():
            return None
        role = {BASE: "base", self._findings.shown.name: "chosen"}.get(candidate, "")
        label = "base alone" if candidate == BASE else candidate
        alt = f"{case.prompt}, by {label}, seed {seed}"
        return Shot(self._album.add(str(path), path), text, alt, f"{case.index}:{seed}", role)

    def pair(self, case: Case, seed: int | None, about: str = "") -> dict[str, Any] | None:
        """Returns the base's image and that of the candidate which the page is about."""
        images = [self.find(BASE, case, seed, "base"), self.find(self._findings.shown.name, case, seed, "adapter")]
        shots = [shot for shot in images if shot]
        return {"shots": shots, "prompt": case.prompt, "about": about} if len(shots) == 2 else None

    def training_image(self, path: str) -> Shot | None:
        """Returns the shot of a training image, or None if it is not there any more."""
        if not path or not Path(path).is_file():
            return None
        return Shot(self._album.add(path, Path(path)), "training", f"Training image {Path(path).name}")


def columns(*names: str) -> list[dict[str, Any]]:
    """Returns table columns; a name that ends in # holds numbers."""
    return [{"name": name.rstrip("#"), "is_number": name.endswith("#")} for name in names]


def row(cells: Iterable[Any], mark: str = "") -> dict[str, Any]:
    """Returns a table row; numbers are written with three decimals."""
    return {"cells": [number(cell) if isinstance(cell, float) else cell for cell in cells], "mark": mark}


def with_range(value: Interval, sign: str = "") -> str:
    """Returns a mean and its interval as text; a dash stands for what is not known."""
    if math.isnan(value.mean):
        return number(value.mean)
    return f"{number(value.mean, sign)} ({number(value.low, sign)} to {number(value.high, sign)})"


def choice(findings: Findings, shots: Shots, file: str | None) -> dict[str, Any] | None:
    """Returns the section on top: what was chosen and why."""
    chosen = findings.choice
    if chosen is None:
        return None
    reference_scores, table = findings.evaluation.reference_scores, findings.table
    tiles = []
    for metric in dict.fromkeys([chosen.likeness_metric, TEXT, *(limit.metric for limit in chosen.limits)]):
        note = f"base {number(table.mean(BASE, metric))}"
        if metric in reference_scores:
            note += f", real {number(reference_scores[metric])}"
        tiles.append({"name": label(metric), "value": number(table.mean(chosen.candidate.name, metric)), "note": note})
    pairs = (shots.pair(case, findings.seed) for case in findings.concept_cases()[:_NUM_HERO])
    what = _stem_label(chosen.candidate) + (f", weight {chosen.candidate.weight:g}")
    return {
        "heading": f"Recommended: {what}",
        "sentences": chosen.sentences,
        "tiles": tiles,
        "file": file,
        "warnings": chosen.warnings,
        "pairs": [pair for pair in pairs if pair],
    }


def candidates(findings: Findings) -> dict[str, Any]:
    """Returns the section with all candidates, and where they lie between likeness and text alignment."""
    evaluation, chosen, table = findings.evaluation, findings.choice, findings.table
    metrics = [facts.name for facts in evaluation.metrics if table.has(facts.name)]
    names = columns("candidate", *(["remark", "balance#"] if chosen else []), *(f"{label(name)}#" for name in metrics))
    rows = []
    for candidate in evaluation.candidates:
        score = chosen.find(candidate.name) if chosen and candidate.name != BASE and candidate.weight else None
        cells: list[Any] = [candidate.name]
        if chosen:
            cells += [_remark(score, chosen), score.balance] if score else ["no adapter", ""]
        cells += [table.mean(candidate.name, metric) for metric in metrics]
        mark = "chosen" if candidate.name == findings.shown.name else "off" if score and score.breaks else ""
        rows.append(row(cells, mark))
    if real := evaluation.reference_scores:
        blank = ["", ""] if chosen else []
        rows.append(row([REAL, *blank, *(real.get(metric, "") for metric in metrics)], "off"))
    return {
        "note": "Likeness and text alignment pull against each other: a candidate is on the frontier if no other that "
        "keeps the limits beats it in both. " + _arrows(evaluation) + _remarks(evaluation),
        "frontier": _frontier(findings) if chosen else None,
        "columns": names,
        "rows": rows,
        "limit_columns": columns("limit", "at most#", "why", "state"),
        "limits": [
            row(
                [
                    label(limit.metric),
                    limit.value,
                    limit.reason,
                    "lifted, no candidate keeps it" if limit.lifted else "",
                ]
            )
            for limit in (chosen.limits if chosen else ())
        ],
    }


def open_comparisons(findings: Findings) -> dict[str, Any] | None:
    """Returns the table of differences that these images cannot decide; None if there are none."""
    comparisons = findings.evaluation.open_comparisons
    if not comparisons:
        return None
    rows = [
        row(
            [
                f"{label(comparison.metric)}: {comparison.candidate}",
                comparison.other,
                comparison.num_images,
                _needed(comparison.num_needed),
            ]
        )
        for comparison in comparisons
    ]
    return {"columns": columns("scored", "not told apart from", "images#", "needed#"), "rows": rows}


def _needed(number: float | None) -> str:
    """Returns a number of images with two digits, as it is a rough guess."""
    if number is None:
        return "more"
    return f"about {float(f'{number:.2g}'):,.0f}" if number < _MANY_IMAGES else f"over {_MANY_IMAGES:,}"


def _arrows(evaluation: Evaluation) -> str:
    lower = [label(facts.name) for facts in evaluation.metrics if not facts.higher_is_better]
    return f"Lower is better for {', '.join(lower)}; higher for all else." if lower else ""


def _remarks(evaluation: Evaluation) -> str:
    """Returns what the values of metrics rest on, in sentences."""
    return "".join(
        f" {label(facts.name).capitalize()}: {facts.remark}." for facts in evaluation.metrics if facts.remark
    )


def _remark(score: CandidateScore, chosen: Choice) -> str:
    if score.name == chosen.candidate.name:
        return "chosen"
    if score.breaks:
        return "breaks " + ", ".join(label(metric) for metric in score.breaks)
    if score.name in chosen.tied:
        return "tied"
    return "frontier" if score.on_frontier else ""


def _frontier(findings: Findings) -> str:
    chosen, table = findings.choice, findings.table
    assert chosen
    likeness = chosen.likeness_metric
    points = [plots.Point(BASE, table.mean(BASE, TEXT), table.mean(BASE, likeness), "base", "base")]
    for score in chosen.scores:
        rank = "frontier" if score.on_frontier else "broken" if score.breaks else "beaten"
        if score.name == chosen.candidate.name:
            rank = "chosen"
        short = f"{score.step if score.step is not None else score.name.rsplit('@', 1)[0]} @ {score.weight:g}"
        is_top = rank in ("frontier", "chosen")
        points.append(plots.Point(score.name, score.text, score.likeness, rank, short if is_top else ""))
    reference = findings.evaluation.reference_scores.get(likeness)
    return plots.frontier(points, (label(TEXT), label(likeness)), reference)


def curves(findings: Findings) -> list[dict[str, Any]]:
    """Returns plots over checkpoints and over weights, where there are several of them."""
    adapters = [
        candidate for candidate in findings.evaluation.candidates if candidate.name != BASE and candidate.weight
    ]
    steps = {candidate.step for candidate in adapters if candidate.step is not None}
    weights = {candidate.weight for candidate in adapters}
    groups = []
    if len(steps) > 1:
        stepped = [candidate for candidate in adapters if candidate.step is not None]
        groups.append(
            _curve_group(findings, "Over checkpoints", "step", stepped, _step, lambda c: f"weight {c.weight:g}")
        )
    if len(weights) > 1:
        groups.append(_curve_group(findings, "Over weights", "weight", adapters, lambda c: c.weight, _stem_label))
    return groups


def _curve_group(
    findings: Findings,
    title: str,
    across: str,
    adapters: Sequence[Candidate],
    place: Callable[[Candidate], float],
    name: Callable[[Candidate], str],
) -> dict[str, Any]:
    labels = _spread(list(dict.fromkeys(map(name, adapters))), name(findings.shown))
    figures = []
    for facts in findings.evaluation.metrics:
        if not findings.table.has(facts.name):
            continue
        lines = []
        for text in labels:
            line = sorted((candidate for candidate in adapters if name(candidate) == text), key=place)
            intervals = [findings.table.interval(candidate.name, facts.name) for candidate in line]
            means, lows, highs = ([getattr(value, end) for value in intervals] for end in ("mean", "low", "high"))
            lines.append(plots.Curve(text, [place(candidate) for candidate in line], means, lows, highs))
        marks = {"base": findings.table.mean(BASE, facts.name)}
        if facts.name in findings.evaluation.reference_scores:
            marks["real"] = findings.evaluation.reference_scores[facts.name]
        figures.append(plots.curves(label(facts.name), across, lines, marks))
    return {"title": title, "labels": labels, "plots": figures}


def _spread(labels: Sequence[str], wanted: str) -> list[str]:
    """Returns at most as many labels as there are colours: the first, the last, the wanted one and some between."""
    if len(labels) <= plots.SERIES:
        return list(labels)
    places = {round(index * (len(labels) - 1) / (plots.SERIES - 2)) for index in range(plots.SERIES - 1)}
    return [text for index, text in enumerate(labels) if index in places or text == wanted]


def _step(candidate: Candidate) -> float:
    return float(candidate.step or 0)


def _stem(candidate: Candidate) -> str:
    return candidate.name.rsplit("@", 1)[0]


def _stem_label(candidate: Candidate) -> str:
    return f"step {candidate.step}" if candidate.step is not None else _stem(candidate)


def grids(findings: Findings, shots: Shots) -> list[dict[str, Any]]:
    """Returns image grids: every prompt at all weights of the shown candidate, and at its weight of all others."""
    recommended = findings.shown
    adapters = [
        candidate for candidate in findings.evaluation.candidates if candidate.name != BASE and candidate.weight
    ]
    over_weights = sorted((c for c in adapters if _stem(c) == _stem(recommended)), key=lambda c: c.weight)
    others = [candidate for candidate in adapters if candidate.weight == recommended.weight]
    grids = []
    if len(over_weights) > 1 or len(others) <= 1:
        title = f"Images over weights, {_stem_label(recommended)}" if len(over_weights) > 1 else "Images"
        grids.append(_grid(findings, shots, title, over_weights, lambda c: f"{c.weight:g}"))
    if len(others) > 1:
        what = "checkpoints" if recommended.step is not None else "candidates"
        title = f"Images over {what}, weight {recommended.weight:g}"
        grids.append(_grid(findings, shots, title, others, _stem_label))
    return [grid for grid in grids if grid["rows"]]


def _grid(
    findings: Findings, shots: Shots, title: str, adapters: Sequence[Candidate], name: Callable[[Candidate], str]
) -> dict[str, Any]:
    concept = findings.concept_cases()
    control = [case for case in findings.evaluation.cases if case.is_control]
    cases = [*concept[:_MAX_CONCEPT], *control[:_MAX_CONTROL]]
    rows = []
    for case in cases:
        images = [shots.find(BASE, case, findings.seed, "base")]
        images += [shots.find(candidate.name, case, findings.seed, name(candidate)) for candidate in adapters]
        about = "does not ask for what was trained" if case.is_control else ""
        if any(images):
            rows.append({"prompt": case.prompt, "about": about, "shots": [shot for shot in images if shot]})
    left_out = len(findings.evaluation.cases) - len(cases)
    more = f" {left_out} more prompts are in {findings.folder.name}/pictures." if left_out else ""
    note = f"Each row is one prompt, from the same noise (seed {findings.seed}).{more}"
    return {"title": title, "note": note, "rows": rows}


def prompts(findings: Findings, shots: Shots) -> dict[str, Any] | None:
    """Returns the scores of each prompt, and the best and the worst images of the shown candidate."""
    table, name = findings.table, findings.shown.name
    likeness = findings.choice.likeness_metric if findings.choice else "clip_image"
    metrics = [metric for metric in (likeness, TEXT) if table.has(metric)]
    if not metrics:
        return None
    rows = []
    for case in findings.concept_cases():
        cells: list[Any] = [case.prompt]
        for metric in metrics:
            mean, base = (_case_mean(table, candidate, metric, case.index) for candidate in (name, BASE))
            cells += [mean, number(mean - base, "+")]
        rows.append(row(cells))
    heads = [head for metric in metrics for head in (f"{label(metric)}#", "against base#")]
    ranked = _ranked(findings, metrics)
    extremes = [
        _extremes(findings, shots, picked, metrics) for picked in (ranked[:_NUM_EXTREME], ranked[-_NUM_EXTREME:][::-1])
    ]
    return {
        "note": f"Means of {name} over {len(findings.evaluation.seeds)} seed(s), and the difference from the base's "
        "images of the same noise.",
        "columns": columns("prompt", *heads),
        "rows": rows,
        "best": extremes[0],
        "worst": extremes[1],
        "copies": _copies(findings, shots),
    }


def _case_mean(table: Table, candidate: str, metric: str, case: int) -> float:
    values = [value for (index, _), value in table.values(candidate, metric).items() if index == case]
    return sum(values) / len(values) if values else float("nan")


def _ranked(findings: Findings, metrics: Sequence[str]) -> list[tuple[int, int]]:
    """Returns (case, seed) of the shown candidate's images, best first by the sum of their ranks in all metrics."""
    ranks: dict[tuple[int, int], int] = {}
    for metric in metrics:
        values = findings.table.values(findings.shown.name, metric)
        places = [(case, seed) for case, seed in values if case is not None and seed is not None]
        for rank, place in enumerate(sorted(places, key=lambda place: -values[place])):
            ranks[place] = ranks.get(place, 0) + rank
    return sorted(ranks, key=lambda place: ranks[place])


def _extremes(
    findings: Findings, shots: Shots, places: Sequence[tuple[int, int]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    cases = {case.index: case for case in findings.evaluation.cases}
    examples = []
    for case, seed in places:
        values = [findings.table.values(findings.shown.name, metric)[case, seed] for metric in metrics]
        about = ", ".join(f"{label(metric)} {number(value)}" for metric, value in zip(metrics, values, strict=True))
        examples.append(shots.pair(cases[case], seed, f"{about}, seed {seed}"))
    return [pair for pair in examples if pair]


def _copies(findings: Findings, shots: Shots) -> list[dict[str, Any]]:
    """Returns the shown candidate's images that are nearest to a training image, beside it."""
    cases = {case.index: case for case in findings.evaluation.cases}
    scores = [s for s in findings.evaluation.scores if (s.candidate, s.metric) == (findings.shown.name, "copying")]
    copies = []
    for score in sorted(scores, key=lambda score: -score.value)[:_NUM_EXTREME]:
        image = shots.find(score.candidate, cases[score.case or 0], score.seed, "generated")
        original = shots.training_image(score.detail)
        if image and original:
            about = f"{label('copying')} {number(score.value)}"
            copies.append({"shots": [image, original], "prompt": score.prompt, "about": about})
    return copies
