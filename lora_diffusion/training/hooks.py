"""What may happen before the steps of a run, between them and after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion.core.logs import logger


class Hook:
    """Something that goes on beside the steps; does nothing unless a subclass says so.

    A hook may draw random numbers: the trainer seeds torch again before each step. It must leave the parameters, and
    the train or eval mode of the networks, as it found them. All but `prepare` is called on the main process only.
    """

    name = ""
    """Under which a checkpoint keeps the state; a hook with a state needs one."""
    should_stop = False
    """True once the run should end with the step that was just done."""
    kept_step: int | None = None
    """A step whose checkpoint must be written, if it was just done, and must stay."""
    decides = False
    """Whether it can ever end the run or keep a step, which all processes must learn after each step."""
    generates = False
    """Whether it generates with the base, which then keeps what only generating needs."""

    def prepare(self) -> None:
        """Comes before the adapter is injected, while the base still has all its encoders; on every process."""

    def begin(self, step: int) -> None:
        """Comes right before the first step, or where the run is continued; `step` of them are done."""

    def on_step(self, step: int) -> None:
        """Follows each optimizer step; `step` of them are done."""

    def on_checkpoint(self, path: Path, step: int) -> None:
        """Follows each checkpoint, which is whole and has been read back."""

    def finish(self, step: int) -> None:
        """Comes after the last step; `step` of them are done."""

    def state(self) -> Mapping[str, Any]:
        """Returns JSON values that a resumed run needs."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state` gave when the checkpoint was written."""


class IntervalHook(Hook):
    """Does something at every n-th step, such as writing previews or an adapter file."""

    def __init__(self, every: int, act: Callable[[int], None]) -> None:
        """Keeps the interval in steps (0: never) and what is called with the step."""
        self._every = every
        self._act = act

    def on_step(self, step: int) -> None:
        """Acts if the step is due."""
        if self._every and step % self._every == 0:
            self._act(step)


class EarlyStop(Hook):
    """Scores the adapter at every n-th step, keeps the best, and ends the run once the score has stopped rising."""

    name = "early_stop"
    decides = True

    def __init__(
        self,
        every: int,
        patience: int,
        score: Callable[[int], float],
        record: Callable[[Sequence[tuple[int, float]]], None],
        *,
        last_step: int | None = None,
        show: Callable[[float], str] = "score {:.3f}".format,
    ) -> None:
        """Has no score yet.

        Args:
            every: steps between two scores, at least 1.
            patience: the run ends when so many scores in a row were no better than the best before; 0 never ends it.
            score: of the adapter as it is now, higher is better; given the step.
            record: given (step, score) of all scores so far, after each.
            last_step: is scored too, whatever the interval; None scores it only if it is due.
            show: a score, for people.
        """
        self._every, self._patience, self._last_step = every, patience, last_step
        self._score, self._record, self._show = score, record, show
        self.scores: list[tuple[int, float]] = []

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether the last `patience` scores were no better than the best before them."""
        if not self._patience or not self.scores:
            return False
        return len(self.scores) - 1 - self._best_index >= self._patience

    @property
    def kept_step(self) -> int | None:  # type: ignore[override]
        """The step with the best score so far."""
        return self.scores[self._best_index][0] if self.scores else None

    @property
    def _best_index(self) -> int:
        return max(range(len(self.scores)), key=lambda index: (self.scores[index][1], -index))

    def on_step(self, step: int) -> None:
        """Scores if the step is due."""
        if step % self._every and step != self._last_step:
            return
        self.scores.append((step, self._score(step)))
        self._record(self.scores)
        best_step, best = self.scores[self._best_index]
        logger.info(
            "step %d  %s  best %s at step %d", step, self._show(self.scores[-1][1]), self._show(best), best_step
        )
        if self.should_stop:
            logger.info("The score has not risen since step %d, which is kept: training ends here.", best_step)

    def state(self) -> Mapping[str, Any]:
        """Returns all scores."""
        return {"scores": self.scores}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes the scores back."""
        self.scores = [(int(step), float(score)) for step, score in state.get("scores", ())]
