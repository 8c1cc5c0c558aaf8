"""The page that compares runs or evaluations: the same prompts and seeds beside each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.privacy import public
from lora_diffusion.core.version import __version__
from lora_diffusion.evaluation.results import Case, Evaluation, paired
from lora_diffusion.evaluation.statistics import Interval
from lora_diffusion.report import plots
from lora_diffusion.report.page_data import write_beside
from lora_diffusion.report.rendering import Album, Shot, write_page
from lora_diffusion.report.report_page import Training
from lora_diffusion.report.sections import Findings, columns, label, row, with_range

_MAX_CONCEPT, _MAX_CONTROL, _MAX_SEEDS = 16, 6, 2


@dataclass(frozen=True)
class Entry:
    """One side of the comparison."""

    name: str
    findings: Findings | None
    training: Training


def write_comparison(path: Path, entries: Sequence[Entry]) -> tuple[Path, ...]:
    """Writes the page, and its numbers beside it; returns the files, the page first.

    Args:
        path: the HTML file.
        entries: at least two; differences are those from the first.

    Raises:
        DataError: two entries have the same name.
        ConfigError: a file that is no page's numbers is in the way of these.
    """
    if len({entry.name for entry in entries}) < len(entries):
        raise DataError(f"Two of the folders are called {entries[0].name}; rename one, so that the page can name them.")
    album = Album()
    evaluated = [entry for entry in entries if entry.findings]
    findings = {entry.name: entry.findings for entry in entries if entry.findings}
    differences = _differences(findings) if len(findings) > 1 else None
    grid = _grid(findings, album) if len(findings) > 1 else []
    context: dict[str, Any] = {
        "title": " against ".join(entry.name for entry in entries),
        "subtitle": "Same prompts, same noise. Differences are those from the first.",
        "version": __version__,
        "slider": (next(iter(findings), entries[0].name), "the other"),
        "warnings": _warnings(entries, evaluated),
        "chosen": [_about(entry) for entry in evaluated],
        "differences": differences,
        "rows": grid,
        "losses": [(entry.name, plots.loss(entry.training.metrics)) for entry in entries if entry.training.metrics],
        "settings": {"columns": columns("setting", *(e.name for e in entries)), "rows": _settings(entries)},
    }
    places = {
        "scores": ("chosen", "Scores"),
        "pictures": ("rows", "Images"),
        "losses": ("losses", "Losses"),
        "settings": ("settings", "Settings"),
    }
    context["sections"] = {anchor: name for anchor, (key, name) in places.items() if context[key]}
    beside = _write_numbers(path, entries, differences)
    write_page(path, "comparison.html.j2", album, {**context, "raw": [file.name for file in beside]})
    return (path, *beside)


def _about(entry: Entry) -> dict[str, Any]:
    assert entry.findings
    chosen = entry.findings.choice
    sentence = chosen.sentences[0] if chosen else "Nothing could be chosen; the last candidate is shown."
    return {"name": entry.name, "candidate": entry.findings.shown.name, "sentence": sentence}


def _warnings(entries: Sequence[Entry], evaluated: Sequence[Entry]) -> list[str]:
    warnings = [
        f"{entry.name} was not evaluated, so only its training is shown." for entry in entries if not entry.findings
    ]
    sides = [entry.findings for entry in evaluated if entry.findings]
    first, others = [side.evaluation for side in sides][:1], [side.evaluation for side in sides][1:]
    for what, differ, consequence in _DIFFERENCES:
        if any(differ(evaluation, other) for evaluation in first for other in others):
            warnings.append(f"The evaluations have different {what}: {consequence}.")
    if others and not _shared(sides):
        warnings.append("The evaluations share no prompt, so that no image can be set against another.")
    if others and not _shared_seeds(sides):
        warnings.append("The evaluations share no seed, so that no image can be set against another.")
    return warnings


def _differ_in_base(one: Evaluation, other: Evaluation) -> bool:
    """Says whether two bases generate differently; by their names where it is not known what they hold."""
    if one.base.base_key and other.base.base_key:
        return one.base.base_key != other.base.base_key
    return replace(one.base, base_key="") != replace(other.base, base_key="")


def _differ_in_references(one: Evaluation, other: Evaluation) -> bool:
    hashes, others = ({file.sha256 for file in evaluation.references} for evaluation in (one, other))
    return hashes != others


_NO_COMPARISON = "their numbers cannot be compared as they stand"
_DIFFERENCES: Sequence[tuple[str, Callable[[Evaluation, Evaluation], bool], str]] = (
    ("scorers", lambda one, other: one.scorer != other.scorer, _NO_COMPARISON),
    ("image settings", lambda one, other: one.settings != other.settings, _NO_COMPARISON),
    ("bases", _differ_in_base, _NO_COMPARISON),
    ("references", _differ_in_references, "likeness to them cannot be compared"),
)
"""What two evaluations should have in common, whether they differ in it, and what follows."""


def _shared_seeds(sides: Sequence[Findings]) -> list[int]:
    return [seed for seed in sides[0].evaluation.seeds if all(seed in side.evaluation.seeds for side in sides)]


def _shared(sides: Sequence[Findings]) -> list[tuple[Case, ...]]:
    """Returns the cases of equal prompt and group, one of each evaluation."""
    by_prompt = [{(c.prompt, c.group): c for c in side.evaluation.cases} for side in sides]
    common = [key for key in by_prompt[0] if all(key in cases for cases in by_prompt[1:])]
    return [tuple(cases[key] for cases in by_prompt) for key in common]


def _differences(findings: dict[str, Findings]) -> dict[str, Any]:
    """Returns means of each, and differences from the first over equal prompts and seeds."""
    names, sides = list(findings), list(findings.values())
    shared, first = _shared(sides), sides[0]
    metrics = [m.name for m in first.evaluation.metrics if all(side.table.has(m.name) for side in sides)]
    rows = []
    for metric in metrics:
        cells: list[Any] = [label(metric)]
        for place, side in enumerate(sides):
            cells.append(with_range(side.table.interval(side.shown.name, metric)))
            if place:
                cases = {cases_of_run[place].index: cases_of_run[0].index for cases_of_run in shared}
                change = paired(side.table, first.table, (side.shown.name, first.shown.name), metric, cases)
                cells += [with_range(change, "+"), _differs(change)]
        rows.append(row(cells))
    heads = [f"{names[0]}#"]
    for name in names[1:]:
        heads += [f"{name}#", f"{name} less {names[0]}#", "differs"]
    return {"columns": columns("score", *heads), "rows": rows, "num_prompts": len(shared)}


def _differs(change: Interval) -> str:
    if math.isnan(change.mean):
        return "\N{EN DASH}"
    return "cannot tell" if change.covers_zero else "yes"


def _grid(findings: dict[str, Findings], album: Album) -> list[dict[str, Any]]:
    """Returns a row of images for each shared prompt and seed: the base of the first, then each side."""
    shared, first = _shared([*findings.values()]), next(iter(findings))
    control = [cases for cases in shared if cases[0].is_control][:_MAX_CONTROL]
    concept = [cases for cases in shared if not cases[0].is_control][:_MAX_CONCEPT]
    images = {name: side.images() for name, side in findings.items()}
    seeds = _shared_seeds([*findings.values()])[:_MAX_SEEDS]
    rows = []
    for cases in (*concept, *control):
        for seed in seeds:
            shots: list[Shot] = []
            for (name, side), case in zip(findings.items(), cases, strict=True):
                file = images[name].get((side.shown.name, case.index, seed))
                path = side.folder / file if file else None
                if path and path.is_file():
                    role = "base" if name == first else ""
                    alt = f"{case.prompt}, {name}, seed {seed}"
                    # The sides may number their prompts differently.
                    pair = f"{cases[0].index}:{seed}"
                    shots.append(Shot(album.add(str(path), path), name, alt, pair, role))
            rows.append({"prompt": cases[0].prompt, "about": f"seed {seed}", "shots": shots})
    return rows


def _settings(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Returns the settings that are not the same in all; a dash stands for the default."""
    keys = dict.fromkeys(key for entry in entries for key in entry.training.facts)
    values = {key: [entry.training.facts.get(key, "\N{EN DASH}") for entry in entries] for key in keys}
    return [row([key, *public(choices)]) for key, choices in values.items() if len(set(choices)) > 1]


def _write_numbers(path: Path, entries: Sequence[Entry], differences: dict[str, Any] | None) -> tuple[Path, ...]:
    values = {
        "differences": [row["cells"] for row in differences["rows"]] if differences else [],
        "columns": [column["name"] for column in differences["columns"]] if differences else [],
        "entries": {
            entry.name: {
                "evaluation": entry.findings.evaluation.to_json() if entry.findings else None,
                "choice": entry.findings.choice.to_json() if entry.findings and entry.findings.choice else None,
                "settings": dict(entry.training.facts),
            }
            for entry in entries
        },
    }
    tables = {
        path.with_name(f"{path.stem}-{entry.name}.csv"): entry.findings.evaluation
        for entry in entries
        if entry.findings
    }
    return write_beside(path, values, tables)
