"""Which candidate is the best: as like the references and as true to the prompts as the limits allow.

Likeness and text alignment pull against each other, so no single score decides. What no other candidate beats in both
is the frontier. On it, each candidate has two shares: how far it goes from the base to real images in likeness, and how
far from unrelated images to the references with their own captions in text alignment. Images of a style that the scorer
does not know never reach what those of the base score, so the base is no goal; only where the references have no
captions, the best of all is. The harmonic mean of the shares (van Rijsbergen 1979, "Information Retrieval", chapter 7)
is maximized: it is 0 where either share is, so neither the base nor a copy that ignores its prompt can win. The next
ones are tied with the best for as long as neither their likeness nor their text alignment can be told from its own; of
those the earliest with the lowest weight is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.evaluation.results import BASE, Candidate, Evaluation, Table

LIKENESS = ("match", "dino_image", "clip_image")
"""Metrics of likeness to the references: to those of the same subject first, since the others do not see whether an
image shows another one, then the one that is better at subjects (Ruiz et al. 2023, section 4.2)."""
MATCHED = 0.5
"""Share of the prompts that ask for what was trained of which a metric must speak to be the one of likeness."""
TEXT = "clip_text"


@dataclass(frozen=True)
class Preference:
    """What the user wants of the choice; None takes the default that `limits` derives from the evaluation."""

    copying: float | None = None
    prior_drift: float | None = None
    prompt_leak: float | None = None
    likeness: str | None = None
    """Metric of likeness; None takes the first of LIKENESS that was measured."""
    text_weight: float = 0.5
    """Share of text alignment in the balance, between 0 (only likeness) and 1 (only text)."""


@dataclass(frozen=True)
class Limit:
    """The highest value of a metric that a candidate may have."""

    metric: str
    value: float
    reason: str
    is_given: bool
    """True if the user set it; then a limit that no candidate keeps is an error."""
    lifted: bool = False
    """True if no candidate keeps it, so that it could not decide."""


@dataclass(frozen=True)
class CandidateScore:
    """How well one candidate does."""

    name: str
    step: int | None
    weight: float
    likeness: float
    text: float
    likeness_share: float
    """0 at the base, 1 at real images."""
    text_share: float
    """0 at unrelated images, 1 at the references with their own captions; where they have none, at the best of all."""
    balance: float
    """Weighted harmonic mean of both shares."""
    on_frontier: bool
    breaks: tuple[str, ...]
    """Metrics whose limit it exceeds."""


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and why."""

    candidate: Candidate
    likeness_metric: str
    scores: tuple[CandidateScore, ...]
    """All candidates but the base, in the order of the evaluation."""
    limits: tuple[Limit, ...]
    tied: tuple[str, ...]
    """Candidates that could not be told apart from the best one; the chosen one is among them."""
    sentences: tuple[str, str]
    warnings: tuple[str, ...]
    """What is to be minded of the choice; `Evaluation.warnings` has what is to be minded of the numbers."""

    @property
    def score(self) -> CandidateScore:
        """How well the chosen candidate does."""
        return self.find(self.candidate.name)

    def find(self, name: str) -> CandidateScore:
        """Returns how well a candidate does."""
        return next(score for score in self.scores if score.name == name)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "candidate": self.candidate.name,
            "step": self.candidate.step,
            "weight": self.candidate.weight,
            "why": " ".join(self.sentences),
            "likeness_metric": self.likeness_metric,
            "limits": [vars(limit) for limit in self.limits],
            "tied": list(self.tied),
            "candidates": [vars(score) for score in self.scores],
            "warnings": list(self.warnings),
        }


def choose(evaluation: Evaluation, preference: Preference | None = None) -> Choice:
    """Picks a candidate.

    Args:
        evaluation: with references, and at least one candidate besides the base.
        preference: limits and weighting that differ from the defaults.

    Raises:
        DataError: the evaluation lacks what the choice needs.
        ConfigError: a limit that the user gave is kept by no candidate.
    """
    preference = preference or Preference()
    table = Table(evaluation)
    likeness = _likeness_metric(table, preference)
    candidates = [candidate for candidate in evaluation.candidates if candidate.name != BASE and candidate.weight]
    if not candidates:
        raise DataError("The evaluation holds the base alone; evaluate checkpoints, weights or files to choose from.")
    bounds = _applied(limits(evaluation, preference), table, candidates)
    scores = _candidate_scores(evaluation, table, candidates, likeness, bounds, preference.text_weight)
    allowed = [score for score in scores if not score.breaks]
    top = frontier([(score.likeness, score.text) for score in allowed])
    names = {allowed[index].name for index in top}
    scores = tuple(replace(score, on_frontier=score.name in names) for score in scores)
    best, *others = sorted(
        (score for score in scores if score.on_frontier),
        key=lambda score: (-score.balance, -score.likeness),
    )
    tied = [best, *takewhile(lambda other: not _are_distinct(table, best.name, other.name, likeness), others)]
    picked = min(tied, key=lambda score: (score.step or 0, score.weight))
    choice = Choice(
        evaluation.candidate(picked.name),
        likeness,
        scores,
        bounds,
        tuple(score.name for score in tied),
        ("", ""),
        _warnings(scores, picked, bounds) + _unlimited(bounds),
    )
    return replace(choice, sentences=_explain(choice, evaluation, table))


def check_metrics(names: Sequence[str]) -> None:
    """Checks that a choice can be made of what these metrics measure; none stands for all.

    Raises:
        ConfigError: one is unknown, or what is needed is not among them.
    """
    for name in names:
        registry.find("metrics", name)
    if names and (TEXT not in names or not {*LIKENESS} & {*names}):
        raise ConfigError(
            f"evaluate.metrics=[{', '.join(names)}]: a choice needs {TEXT} and {' or '.join(LIKENESS)}; add them, or "
            "leave the key out to measure all."
        )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of points that no other point beats in one coordinate and equals or beats in the other.

    >>> frontier([(1.0, 3.0), (2.0, 2.0), (1.0, 2.0), (3.0, 1.0)])
    [0, 1, 3]
    """

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points)

    return [index for index, point in enumerate(points) if not beaten(point)]


def limits(evaluation: Evaluation, preference: Preference) -> tuple[Limit, ...]:
    """Returns a limit for each of copying, prior_drift and prompt_leak that was measured.

    The defaults, each relative to the base or to real images:

    - copying: what the references score, since held-out images of the same thing are as near to the training images
      as honest ones can be. Without their scores, or if some were trained on: half way from the base to a perfect copy.
    - prior_drift: half of the distance between two of the base's own images of one prompt. At the whole of it another
      image altogether is generated.
    - prompt_leak: half of what real images exceed the base by in likeness. Beyond it the concept is shown rather than
      not where no prompt asks for it.

    Raises:
        ConfigError: the user gave a limit for a metric that was not measured.
    """
    table = Table(evaluation)
    limits = []
    for metric in _DEFAULTS:
        given = getattr(preference, metric)
        if not table.has(metric):
            if given is not None:
                raise ConfigError(f"The evaluation has no scores of {metric}, so they cannot be kept to {given:g}.")
            continue
        if given is not None:
            limits.append(Limit(metric, given, "as asked for", is_given=True))
        elif default := _DEFAULTS[metric](evaluation, table):
            limits.append(Limit(metric, *default, is_given=False))
    return tuple(limits)


def _copying_limit(evaluation: Evaluation, table: Table) -> tuple[float, str] | None:
    score = evaluation.reference_scores.get("copying")
    trained = {file.sha256 for file in evaluation.training_images}
    if score is not None and trained.isdisjoint(file.sha256 for file in evaluation.references):
        return score, "what the references themselves score"
    return (table.mean(BASE, "copying") + 1) / 2, "half way from the base to a perfect copy"


def _drift_limit(evaluation: Evaluation, table: Table) -> tuple[float, str] | None:
    del table
    apart = evaluation.random_baseline.get("prior_drift")
    return None if apart is None else (apart / 2, "half of the distance between two of the base's own images")


def _leak_limit(evaluation: Evaluation, table: Table) -> tuple[float, str] | None:
    score = evaluation.reference_scores.get("clip_image")
    if score is None:
        return None
    return (score - table.mean(BASE, "clip_image")) / 2, "half of the way from the base to real images"


_DEFAULTS = {"copying": _copying_limit, "prior_drift": _drift_limit, "prompt_leak": _leak_limit}


def _likeness_metric(table: Table, preference: Preference) -> str:
    wanted = (preference.likeness,) if preference.likeness else LIKENESS
    num_prompts = len(table.cases(TEXT))
    measured = [
        metric
        for metric in wanted
        if table.has(metric) and (preference.likeness or len(table.cases(metric)) >= MATCHED * num_prompts)
    ]
    if not measured or not table.has(TEXT):
        raise DataError(
            f"The evaluation has no scores of {' or '.join(wanted) if not measured else TEXT} for prompts that ask for "
            "what was trained, so that nothing can be chosen; evaluate again with --references and such prompts."
        )
    return measured[0]


def _applied(bounds: Sequence[Limit], table: Table, candidates: Sequence[Candidate]) -> tuple[Limit, ...]:
    """Lifts each default limit that leaves no candidate, one after the other; a given one must be kept by some."""
    left = list(candidates)
    applied = []
    for limit in bounds:
        keeping = [candidate for candidate in left if table.mean(candidate.name, limit.metric) <= limit.value]
        if not keeping and limit.is_given:
            lowest = min(left, key=lambda candidate: table.mean(candidate.name, limit.metric))
            raise ConfigError(
                f"No candidate keeps {limit.metric} <= {limit.value:g} and the limits before it; the nearest is "
                f"{lowest.name} with {table.mean(lowest.name, limit.metric):.3f}. Raise the limit, or train less."
            )
        applied.append(replace(limit, lifted=not keeping))
        left = keeping or left
    return tuple(applied)


def _candidate_scores(
    evaluation: Evaluation,
    table: Table,
    candidates: Sequence[Candidate],
    likeness: str,
    bounds: Sequence[Limit],
    text_weight: float,
) -> tuple[CandidateScore, ...]:
    low, high = _anchors(evaluation, table, candidates, likeness)
    baseline = evaluation.random_baseline.get(TEXT, 0.0)
    most = _text_of_references(evaluation)
    if most is None:
        most = max(table.mean(name, TEXT) for name in (BASE, *(candidate.name for candidate in candidates)))
    scores = []
    for candidate in candidates:
        mean, text = table.mean(candidate.name, likeness), table.mean(candidate.name, TEXT)
        shares = share(mean, low, high), share(text, baseline, most)
        broken = [
            limit.metric
            for limit in bounds
            if not limit.lifted and table.mean(candidate.name, limit.metric) > limit.value
        ]
        facts = candidate.name, candidate.step, candidate.weight, mean, text
        scores.append(CandidateScore(*facts, *shares, balance(*shares, text_weight), False, (*broken,)))
    return tuple(scores)


def _text_of_references(evaluation: Evaluation) -> float | None:
    """Returns the text alignment of the references with their own captions; None where it is not known."""
    score = evaluation.reference_scores.get(TEXT)
    return score if score is not None and score > evaluation.random_baseline.get(TEXT, 0.0) else None


def _anchors(
    evaluation: Evaluation, table: Table, candidates: Sequence[Candidate], likeness: str
) -> tuple[float, float]:
    """Returns the likeness of the base and that of real images, or where it is unknown, of the best candidate."""
    best = max(table.mean(candidate.name, likeness) for candidate in candidates)
    return table.mean(BASE, likeness), evaluation.reference_scores.get(likeness, best)


def share(value: float, low: float, high: float) -> float:
    """Returns how far a value goes from `low` to `high`, 0 to 1; 0 where `high` is no higher than `low`."""
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.0


def balance(likeness: float, text: float, text_weight: float = 0.5) -> float:
    """Returns the weighted harmonic mean of the shares of likeness and text alignment."""
    if not min(likeness, text):
        return 0.0
    return 1 / ((1 - text_weight) / likeness + text_weight / text)


def _are_distinct(table: Table, one: str, other: str, likeness: str) -> bool:
    """Says whether likeness or text alignment of two candidates surely differ."""
    return not all(table.difference(one, other, metric).covers_zero for metric in (likeness, TEXT))


def _warnings(scores: Sequence[CandidateScore], picked: CandidateScore, bounds: Sequence[Limit]) -> tuple[str, ...]:
    warnings = [
        f"No candidate keeps {limit.metric} at or below {limit.value:.3f} ({limit.reason}), so it did not decide."
        for limit in bounds
        if limit.lifted
    ]
    if not picked.likeness_share:
        warnings.append("No candidate that keeps the limits looks more like the references than the base alone.")
    steps = sorted({score.step for score in scores if score.step is not None})
    if len(steps) > 1 and picked.step == steps[-1]:
        warnings.append("The last checkpoint was chosen: a longer run may be better still.")
    if len(steps) > 1 and picked.step == steps[0]:
        warnings.append("The first checkpoint was chosen: save more often (train.save_every_steps) to look before it.")
    return tuple(warnings)


def _unlimited(bounds: Sequence[Limit]) -> tuple[str, ...]:
    missing = sorted(_DEFAULTS.keys() - {limit.metric for limit in bounds})
    if not missing:
        return ()
    return (f"{', '.join(missing)} could not be measured, so that nothing limited it.",)


def _explain(choice: Choice, evaluation: Evaluation, table: Table) -> tuple[str, str]:
    picked, likeness = choice.score, choice.likeness_metric
    goal_score = evaluation.reference_scores.get(likeness)
    goal = f"real images ({likeness} {goal_score:.3f})" if goal_score is not None else "the most alike candidate"
    text = _text_of_references(evaluation)
    text_goal = "best text alignment" if text is None else f"text alignment of real images ({text:.3f})"
    first = (
        f"{picked.name} goes {picked.likeness_share:.0%} of the way from the base ({likeness} "
        f"{table.mean(BASE, likeness):.3f}) to {goal} with {picked.likeness:.3f}, and keeps {picked.text_share:.0%} of "
        f"the {text_goal} with {TEXT} {picked.text:.3f}: a balance of {picked.balance:.2f}."
    )
    return first, f"Of {len(choice.scores)} candidates {_others(choice)}."


def _others(choice: Choice) -> str:
    picked = choice.score
    broken = [score for score in choice.scores if score.breaks]
    rest = [score for score in choice.scores if score.on_frontier and score.name != picked.name]
    clauses = []
    if broken:
        counts = _count(metric for score in broken for metric in score.breaks)
        clauses.append(f"{len(broken)} {'break' if len(broken) > 1 else 'breaks'} a limit ({counts})")
    beaten = len(choice.scores) - len(broken) - len(rest) - 1
    if beaten:
        clauses.append(f"{beaten} {'are' if beaten > 1 else 'is'} beaten in likeness and text by others")
    tied = [name for name in choice.tied if name != picked.name]
    if tied:
        clauses.append(f"{len(tied)} could not be told apart from it and came later or need more weight")
    clear = [score for score in rest if score.name not in tied]
    if clear:
        rival = max(clear, key=lambda score: score.balance)
        scores = f"{rival.likeness:.3f} and {rival.text:.3f}"
        clauses.append(f"the next best, {rival.name}, has {scores} (balance {rival.balance:.2f})")
    if not clauses:
        return "it is the only one"
    return " and ".join([", ".join(clauses[:-1]), clauses[-1]] if len(clauses) > 1 else clauses)


def _count(metrics: Iterable[str]) -> str:
    return ", ".join(f"{metric} {count}" for metric, count in Counter(metrics).items())
