"""One HTML file with the tables of a comparison, and the images of each method side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lora_diffusion.core.files import write_text
from lora_diffusion.evaluation.results import BASE, Evaluation
from lora_diffusion.report.rendering import Album, number
from scripts.measure.peers.compositions import Composed
from scripts.measure.peers.tables import SetResult, candidate_name, tables

_NUM_PROMPTS = 16


def write_comparison_page(
    path: Path, results: Sequence[SetResult], composed: Sequence[Composed], numbers: Mapping[str, Any]
) -> None:
    """Writes the page; images are those of the first training seed and the first noise.

    Args:
        path: the HTML file; the evaluations lie in folders beside it.
        results: the sets.
        composed: the compositions; may be empty.
        numbers: of `tables.summary`.
    """
    album = Album()
    grids = []
    for result in results:
        name = result.sample_set.name
        candidates = {BASE: BASE} | {label: candidate_name(result.of(label)[0]) for label in result.labels}
        rows = _rows(result.evaluation, candidates, path.parent / name / "evaluation", album)
        grids.append((name, list(candidates), [*rows, ("real pictures", _real(result, len(candidates), album))]))
    for one in composed:
        scores = [
            ", ".join(f"{metric} {number(value)}" for metric, value in row.items()) for row in one.scores.values()
        ]
        columns = [f"{way}: {text}" for way, text in zip(one.scores, scores, strict=True)]
        grids.append((one.name, columns, list(_rows(one.evaluation, one.candidates, one.folder, album))))
    album.develop()
    environment = Environment(
        autoescape=True, loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True
    )
    style = files("lora_diffusion.report").joinpath("templates", "page.css").read_text("utf-8")
    template = environment.get_template("page.html.j2")
    missing = numbers["missing_metrics"]
    write_text(path, template.render(style=style, tables=tables(numbers), grids=grids, missing=missing, url=album.url))


def _rows(
    evaluation: Evaluation, candidates: Mapping[str, str], folder: Path, album: Album
) -> Iterator[tuple[str, list[str]]]:
    """Yields (prompt, keys of the images of the candidates) for each prompt that asks for what was learnt."""
    first_seed = evaluation.seeds[0]
    images = {
        (score.candidate, score.case): folder / score.image
        for score in evaluation.scores
        if score.image and score.seed == first_seed
    }
    for case in [case for case in evaluation.cases if not case.is_control][:_NUM_PROMPTS]:
        paths = [images[name, case.index] for name in candidates.values()]
        yield case.prompt, [album.add(str(path), path) for path in paths]


def _real(result: SetResult, num: int, album: Album) -> list[str]:
    paths = sorted(result.sample_set.references.glob("*.png"))[:num]
    return [album.add(str(path), path) for path in paths]
