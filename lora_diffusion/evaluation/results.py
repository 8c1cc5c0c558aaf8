"""The folder that an evaluation leaves: `evaluation.json`, `scores.csv` and `images/`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_diffusion.core.errors import DataError
from lora_diffusion.core.files import read_json, read_whole, write_json, write_text
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.core.version import __version__
from lora_diffusion.evaluation.statistics import Interval, interval, nested_interval

if TYPE_CHECKING:
    import pandas as pd


VERSION = 1
BASE = "base"
"""Name of the candidate that has no adapter; it is always there, and first."""
REAL = "real images"
"""What the row of the references is called in tables."""
ALL = "all"
"""Group of the summary over all cases that a metric looks at."""
CONTROL_GROUPS = frozenset({"prior", "leak"})
"""Groups of prompts that do not ask for what was trained: of its class (prior), and of other things (leak)."""
OUTPUTS: Mapping[str, str] = {"concept": "asked", "control": "plain"}
"""What a metric scores (`Metric.outputs`) -> how evaluation.json says it."""
_KEYS: Mapping[str, str] = {
    "control_prompt": "plain",
    "scoring_caption": "meaning",
    "group": "kind",
    "image": "picture",
    "training_images": "training_pictures",
    "random_baseline": "chance",
    "reference_scores": "real",
}
"""Field of a record -> its key in evaluation.json and its column in scores.csv, where they differ."""
_NUM_DIGITS = 6
_ABOUT_CONTROL = ("prior_drift", "prompt_leak")
"""Metrics of control prompts, where an evaluation does not say it."""
Place = tuple[int | None, int | None]
"""Index of the case, and seed; a seed of None stands for all images of the case."""


@dataclass(frozen=True)
class Base:
    """The base model that generated the images."""

    source: str
    architecture: str
    family: str
    base_key: str = ""
    """Hash of all of it that decides what it generates; "" in evaluations that do not say it."""


@dataclass(frozen=True)
class Settings:
    """What all images share."""

    num_steps: int
    guidance: float
    size: tuple[int, int] | None
    """Width and height in pixels; None is the base's own resolution."""
    negative: str


@dataclass(frozen=True)
class FileHash:
    """A file and its content."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Candidate:
    """One of the things that are compared: the base with these adapters at these weights."""

    name: str
    """"base", or name and weight, say "step-000100@1.0"."""
    file: str | None
    """Adapter file or checkpoint; None for the base and for compositions."""
    sha256: str | None
    step: int | None
    """Training step, of checkpoints."""
    weights: Mapping[str, float]
    """Name of the adapter -> its weight in these images; `Evaluation.adapters` has the files."""
    weight: float
    """What the weights of the adapter or composition were multiplied with; 0 for the base."""


@dataclass(frozen=True)
class Case:
    """One prompt of the evaluation."""

    index: int
    prompt: str
    control_prompt: str
    """The prompt without the trigger words."""
    scoring_caption: str
    """What the image should show, in words that the scorer knows; a trigger means nothing to it."""
    group: str
    """subject, style, composition, ...: the prompt asks for what was trained. prior, leak: it does not."""
    suite: str

    @property
    def is_control(self) -> bool:
        """Whether the prompt does not ask for what was trained."""
        return self.group in CONTROL_GROUPS


@dataclass(frozen=True)
class MetricFacts:
    """How to read a metric."""

    name: str
    meaning: str
    higher_is_better: bool
    judges: str = ""
    """"asked": concept prompts, "plain": control prompts, "": an evaluation that does not say it."""
    remark: str = ""
    """What its values rest on in this evaluation; "" if there is nothing to say."""

    @property
    def is_about_control(self) -> bool:
        """Whether it scores the images of control prompts."""
        return self.judges == OUTPUTS["control"] if self.judges else self.name in _ABOUT_CONTROL


@dataclass(frozen=True)
class Score:
    """One number: a line of scores.csv."""

    candidate: str
    step: int | None
    weight: float
    case: int | None
    group: str
    prompt: str
    seed: int | None
    """None where the number belongs to all images of a prompt."""
    metric: str
    value: float
    image: str
    """Path in the folder; "" where the number belongs to several images."""
    detail: str = ""
    """What the metric has to say, for `copying` the nearest training image."""


@dataclass(frozen=True)
class Summary:
    """Mean of a metric over the cases of one group, with 95 % intervals over prompts and seeds.

    The differences are paired: same prompt, same seed, same noise. They are None for the candidate itself.
    """

    candidate: str
    metric: str
    group: str
    """A group of cases, or "all"."""
    mean: float
    low: float | None
    """None, as all other bounds, where a single score cannot tell how sure its mean is."""
    high: float | None
    count: int
    """Number of scores."""
    vs_base_mean: float | None = None
    vs_base_low: float | None = None
    vs_base_high: float | None = None
    vs_first_mean: float | None = None
    """Against the first candidate after the base."""
    vs_first_low: float | None = None
    vs_first_high: float | None = None

    def format(self, form: str) -> str:
        """Returns the mean and, where it is known, its interval; the form is that of the numbers, say ".3f"."""
        if self.low is None or self.high is None:
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class OpenComparison:
    """Two candidates whose paired difference in a metric has an interval that covers 0."""

    metric: str
    candidate: str
    other: str
    num_images: int
    """Of each of the two."""
    num_needed: float | None
    """A rough guess of how many would decide it; None where no number can be guessed."""


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation found."""

    base: Base
    scorer: Mapping[str, str]
    """Role of a scoring model -> its name; scores of two models do not compare."""
    settings: Settings
    candidates: Sequence[Candidate]
    cases: Sequence[Case]
    seeds: Sequence[int]
    metrics: Sequence[MetricFacts]
    summary: Sequence[Summary]
    adapters: Mapping[str, FileHash] = field(default_factory=dict)
    references: Sequence[FileHash] = ()
    reference_captions: Sequence[str] = ()
    """What each reference shows, without trigger words; none where no captions lie beside them."""
    training_images: Sequence[FileHash] = ()
    warnings: Sequence[str] = ()
    open_comparisons: Sequence[OpenComparison] = ()
    """Differences that may be chance; earlier versions listed them in `warnings`."""
    random_baseline: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the score of what has nothing to do with the prompt or the references."""
    reference_scores: Mapping[str, float] = field(default_factory=dict)
    """Metric -> the score of the reference images themselves: for likeness each against the others, for copying
    against the training images. What an adapter can reach at best, and what is no copying."""
    lora_diffusion: str = __version__
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package that generates or scores -> its version."""
    scores: Sequence[Score] = ()
    """Lines of scores.csv; not in evaluation.json."""

    def to_json(self) -> dict[str, Any]:
        """Returns the content of evaluation.json."""
        values = {key: _plain(value) for key, value in _keyed(self).items() if key != "scores"}
        return {"version": VERSION, **values}

    def text(self) -> str:
        """Returns lines for people: the means over all cases, and the warnings."""
        width = max(len(name) for name in (REAL, *(candidate.name for candidate in self.candidates)))
        names = [metric.name for metric in self.metrics]
        rows = [f"{'':{width}}  {'  '.join(names)}"]
        for candidate in self.candidates:
            means = (f"{self.find(candidate.name, name).mean:{len(name)}.3f}" for name in names)
            rows.append(f"{candidate.name:{width}}  {'  '.join(means)}")
        if self.reference_scores:
            scores = ((len(name), self.reference_scores.get(name)) for name in names)
            cells = (" " * length if score is None else f"{score:{length}.3f}" for length, score in scores)
            rows.append(f"{REAL:{width}}  {'  '.join(cells)}".rstrip())
        scorers = ", ".join(self.scorer.values()) or "no model"
        remarks = [f"{metric.name}: {metric.remark}." for metric in self.metrics if metric.remark]
        undecided = [line for line in [undecided_line(self.open_comparisons)] if line]
        return "\n".join([*rows, f"Scored by {scorers}.", *remarks, *self.warnings, *undecided])

    def table(self) -> pd.DataFrame:
        """Returns the lines of scores.csv as a table."""
        import pandas as pd

        return pd.DataFrame(map(_keyed, self.scores), columns=_COLUMNS).astype(
            {"step": "Int64", "case": "Int64", "seed": "Int64"}
        )

    def candidate(self, name: str) -> Candidate:
        """Returns the candidate of that name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def find(self, candidate: str, metric: str, group: str = ALL) -> Summary:
        """Returns one summary.

        Raises:
            KeyError: there is none.
        """
        for summary in self.summary:
            if (summary.candidate, summary.metric, summary.group) == (candidate, metric, group):
                return summary
        raise KeyError(f"{metric} of {candidate} on {group}")


def undecided_line(comparisons: Sequence[OpenComparison]) -> str:
    """Returns one sentence on the comparisons that cannot be decided; nothing if there are none."""
    if not comparisons:
        return ""
    metrics = name_some(list(dict.fromkeys(comparison.metric for comparison in comparisons)))
    return (
        f"{len(comparisons)} comparison(s) of {metrics} need more images than were made, so their order may be chance; "
        "'lora-diffusion report' lists them."
    )


def write(evaluation: Evaluation, folder: Path) -> None:
    """Writes scores.csv and then evaluation.json, each atomically."""
    write_text(folder / "scores.csv", to_csv(evaluation.scores))
    write_json(folder / "evaluation.json", evaluation.to_json())


def read(folder: Path) -> Evaluation:
    """Reads what `write` wrote.

    Raises:
        DataError: it is not an evaluation folder, or one of another version.
    """
    path = folder / "evaluation.json"
    try:
        values = read_json(path)
        version = values.pop("version")
        if version != VERSION:
            raise DataError(f"{path} has version {version}, and this program reads version {VERSION}; evaluate again.")
        scores = read_csv(read_whole(folder / "scores.csv").decode("utf-8"))
        return typing.cast(Evaluation, _typed({**values, "scores": scores}, Evaluation))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} is no whole evaluation: {shown(str(error), 300)}. Make one with 'lora-diffusion evaluate'."
        ) from error


def to_csv(scores: Iterable[Score]) -> str:
    """Returns the scores as CSV with a header; values have six decimals."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for score in scores:
        row = {**_keyed(score), "value": f"{score.value:.{_NUM_DIGITS}f}"}
        writer.writerow(["" if row[name] is None else row[name] for name in _COLUMNS])
    return stream.getvalue()


def read_csv(text: str) -> tuple[Score, ...]:
    """Reads what `to_csv` wrote."""
    fields = {_KEYS.get(name, name): (name, hint) for name, hint in typing.get_type_hints(Score).items()}
    return tuple(
        Score(**{fields[key][0]: _from_text(value, fields[key][1]) for key, value in row.items()})
        for row in csv.DictReader(io.StringIO(text, newline=""))
    )


_COLUMNS = tuple(_KEYS.get(column.name, column.name) for column in dataclasses.fields(Score))


def _from_text(text: str, hint: Any) -> Any:
    if isinstance(hint, UnionType):  # only `int | None` occurs
        return int(text) if text else None
    return hint(text)


def _keyed(record: Any) -> dict[str, Any]:
    """Returns key or column -> value of a record."""
    return {_KEYS.get(name, name): value for name, value in vars(record).items()}


def _plain(value: Any) -> Any:
    """Returns records, mappings and sequences as JSON values; numbers that are no whole ones have six decimals."""
    if dataclasses.is_dataclass(value):
        return _plain(_keyed(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return round(value, _NUM_DIGITS)
    return value if isinstance(value, str | int | None) else [_plain(item) for item in value]


def _typed(value: Any, hint: Any) -> Any:
    """Turns JSON values into the records that a type hint names."""
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        fields = {_KEYS.get(name, name): (name, field) for name, field in typing.get_type_hints(hint).items()}
        values = {fields[key][0]: _typed(item, fields[key][1]) for key, item in value.items()}
        return hint(**values)  # type: ignore[operator]
    if isinstance(value, Mapping):
        return {key: _typed(item, typing.get_args(hint)[1]) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_typed(item, (typing.get_args(hint) or (None,))[0]) for item in value)
    return value


class Table:
    """The scores of an evaluation by candidate and metric, over the cases that the metric is about.

    Metrics of control prompts, such as prior_drift, are about those that do not ask for what was trained, all others
    about those that do.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        """Sorts the scores once."""
        self._values: dict[tuple[str, str], dict[Place, float]] = defaultdict(dict)
        control = {facts.name for facts in evaluation.metrics if facts.is_about_control}
        for score in evaluation.scores:
            if (score.group in CONTROL_GROUPS) == (score.metric in control):
                self._values[score.candidate, score.metric][score.case, score.seed] = score.value

    def has(self, metric: str) -> bool:
        """Says whether the metric was measured on such cases."""
        return any(metric == name for _, name in self._values)

    def cases(self, metric: str) -> set[int | None]:
        """Returns the cases of which a metric says something."""
        return {case for (_, name), values in self._values.items() if name == metric for case, _ in values}

    def values(self, candidate: str, metric: str) -> Mapping[Place, float]:
        """Returns the scores of a candidate; none where it was not measured."""
        return self._values.get((candidate, metric), {})

    def mean(self, candidate: str, metric: str) -> float:
        """Returns the mean, NaN where there is no score."""
        values = self.values(candidate, metric)
        return sum(values.values()) / len(values) if values else math.nan

    def interval(self, candidate: str, metric: str) -> Interval:
        """Returns the mean with its 95 % interval."""
        return _interval(self.values(candidate, metric))

    def difference(self, one: str, other: str, metric: str) -> Interval:
        """Returns the mean of `one` minus `other` over images of equal prompt and seed, with its 95 % interval."""
        first, against = self.values(one, metric), self.values(other, metric)
        return _interval({place: first[place] - against[place] for place in first if place in against})


def paired(one: Table, other: Table, candidates: tuple[str, str], metric: str, cases: Mapping[int, int]) -> Interval:
    """Returns the mean difference of a candidate of one evaluation from that of another, with its 95 % interval.

    Args:
        one: minuend.
        other: subtrahend.
        candidates: names in both.
        metric: the same in both.
        cases: index of a case in `one` -> index of the case with the same prompt in `other`.
    """
    first, against = one.values(candidates[0], metric), other.values(candidates[1], metric)
    shared: dict[Place, float] = {
        (case, seed): value - against[cases[case], seed]
        for (case, seed), value in first.items()
        if case is not None and case in cases and (cases[case], seed) in against
    }
    return _interval(shared)


def _interval(values: Mapping[Place, float]) -> Interval:
    """Returns the interval over the cases that have most seeds."""
    cases: dict[int | None, dict[int | None, float]] = defaultdict(dict)
    for (case, seed), value in values.items():
        cases[case][seed] = value
    longest = max(map(len, cases.values()), default=0)
    rows = [row for row in cases.values() if len(row) == longest]
    if not rows:
        return Interval(math.nan, math.nan, math.nan)
    if any(row.keys() != rows[0].keys() for row in rows):
        return nested_interval(np.array([list(row.values()) for row in rows]))
    return interval(np.array([[row[seed] for seed in rows[0]] for row in rows]))
