"""How good an adapter of images is while it is trained, scored as `evaluate` says: early stopping, and its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.config.schema import Config
from lora_diffusion.core.base_model import Loaded
from lora_diffusion.core.files import write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.samples import ImageText, Request
from lora_diffusion.data.preflight import find_images
from lora_diffusion.evaluation.harness import PromptGrid
from lora_diffusion.evaluation.progress import ProgressScorer, progress_scorer
from lora_diffusion.evaluation.references import read_captions
from lora_diffusion.evaluation.select import check_metrics
from lora_diffusion.scoring.clip import default_clip
from lora_diffusion.scoring.scorers import LOADERS, Scorers
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import EarlyStop
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import PROGRESS_NAME
from lora_diffusion.workflows import select

_SETTING = "evaluate.references"


def check(config: Config, samples: Sequence[ImageText]) -> None:
    """Checks before anything is loaded that the run can be evaluated as `evaluate` says, while and after it trains.

    Raises:
        InputError: it cannot.
    """
    settings = config.evaluate
    if not (settings.after_training or settings.every_steps):
        return
    _references(config)
    select.cases(config, samples[0].trigger)
    models = Scorers({"clip": default_clip(config.model.path), **select.scorers(config)})
    for role in models.names.keys() & LOADERS.keys():
        models.find(role)
    if settings.after_training:
        select.check_name(RunFolder(Path(config.output.path)).name(config))
        check_metrics(settings.metrics)
    if settings.after_training and config.train.keep_checkpoints:
        logger.warning(
            "evaluate.after_training compares the last %d checkpoints only; train.keep_checkpoints=0 keeps all.",
            config.train.keep_checkpoints,
        )


class ImageScores(EarlyStop):
    """Scores generated images at every n-th step, keeps the best checkpoint, and ends the run as patience says."""

    generates = True

    def __init__(self, run: CheckedRun, loaded: Loaded) -> None:
        """Takes the base as it will be at each step."""
        evaluate = run.config.evaluate
        super().__init__(evaluate.every_steps, evaluate.patience, self._score_step, self._write)
        self._run, self._loaded = run, loaded
        self._generate = partial(run.family.generate, loaded)
        self._scorer: ProgressScorer | None = None

    def prepare(self) -> None:
        """Scores the base alone, which also encodes the prompts while the text encoder is there."""
        config, info = self._run.config, self._loaded.info
        evaluate, preview = config.evaluate, config.preview
        guidance = info.guidance if preview.guidance is None else preview.guidance
        scorers = Scorers({"clip": evaluate.clip or default_clip(config.model.path)}, str(self._loaded.device))
        scorers.find("clip")
        trigger = getattr(self._run.samples[0], "trigger", "")
        cases = select.cases(config, trigger)
        grid = PromptGrid(cases, evaluate.seeds, Request("", 0, preview.negative, preview.num_steps, guidance))
        references = _references(config)
        captions = read_captions(str(evaluate.references), references, [trigger], _SETTING)
        self._scorer = progress_scorer(grid, self._generate, scorers, references, captions)

    def state(self) -> Mapping[str, Any]:
        """Returns all scores, and whether the captions of the references decided them."""
        return {**super().state(), "captions": bool(self._scorer and self._scorer.uses_captions)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes the scores back, and goes on as they were made, so that they can be compared."""
        super().load_state(state)
        if self._scorer and self.scores and not state.get("captions"):
            self._scorer = self._scorer.without_captions()

    def _score_step(self, step: int) -> float:
        del step
        assert self._scorer is not None, "hooks are prepared before the first step"
        return self._scorer.score(self._generate)

    def _write(self, scores: Sequence[tuple[int, float]]) -> None:
        lines = [{"step": step, "score": score} for step, score in scores]
        write_json(self._run.folder.path / PROGRESS_NAME, lines)


def hooks(run: CheckedRun, loaded: Loaded) -> list[ImageScores]:
    """Returns the hook, if its samples are images and a score is due in the run."""
    is_due = 0 < run.config.evaluate.every_steps <= run.num_steps
    return [ImageScores(run, loaded)] if run.sample_type.makes_images and is_due else []


def _references(config: Config) -> list[Path]:
    return find_images(str(config.evaluate.references), _SETTING)
