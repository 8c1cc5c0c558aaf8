"""Conditions that an evaluation must meet, for scripts that decide on its result.

A gate is `metric op number`, say "clip_image>=0.75", for every candidate but the base and what has weight 0, which is
the base again, or `metric@candidate op number`, say "prior_drift@step-000200@1.0<=0.1", for one. Operators: >=, <=, >,
<. What is compared is the mean over all cases.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.text import suggestion
from lora_diffusion.evaluation.results import Evaluation

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"\s*(\w+)(?:@(.+?))?\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """One condition."""

    text: str
    metric: str
    candidate: str | None
    """None: all that have an adapter."""
    operator: str
    limit: float

    def failures(self, evaluation: Evaluation) -> list[str]:
        """Returns one line for each candidate that does not meet it; without any, that there is nothing to meet it."""
        names = [candidate.name for candidate in evaluation.candidates if any(candidate.weights.values())]
        if not names and self.candidate is None:
            return [f"{self.text}: no candidate has an adapter"]
        summaries = [evaluation.find(name, self.metric) for name in ([self.candidate] if self.candidate else names)]
        return [
            f"{self.text}: {summary.candidate} has {summary.format('.4g')}"
            for summary in summaries
            if not _OPERATORS[self.operator](summary.mean, self.limit)
        ]


def parse(text: str, metrics: Collection[str], candidates: Collection[str]) -> Gate:
    """Reads a gate.

    Raises:
        ConfigError: it has another form, or names a metric or candidate that is not evaluated.
    """
    match = _GATE.fullmatch(text)
    if not match:
        raise ConfigError(f'--assert "{text}" is no condition; write METRIC>=NUMBER, say "clip_image>=0.75".')
    metric, candidate = match[1], match[2]
    for name, known, what in ((metric, metrics, "metric"), (candidate, candidates, "candidate")):
        if name is not None and name not in known:
            raise ConfigError(
                f'--assert "{text}": no {what} {name} is evaluated{suggestion(name, known)}. '
                f"Evaluated: {', '.join(known)}."
            )
    return Gate(text, metric, candidate, match[3], float(match[4]))


def failures(gates: Sequence[Gate], evaluation: Evaluation) -> list[str]:
    """Returns one line for each gate and candidate that fails."""
    return [line for gate in gates for line in gate.failures(evaluation)]
