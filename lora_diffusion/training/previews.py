"""Previews: what the model generates for a few requests while it is trained, in `previews/` of the run folder."""

from __future__ import annotations

from lora_diffusion.core.base_model import Loaded
from lora_diffusion.training import run_files
from lora_diffusion.training.checked_run import CheckedRun
from lora_diffusion.training.hooks import IntervalHook


class Previews(IntervalHook):
    """Answers the requests of a run before it, and after every n-th step."""

    generates = True

    def __init__(self, run: CheckedRun, loaded: Loaded) -> None:
        """Takes the base as it will be at each step."""
        super().__init__(run.config.train.preview_every_steps, self._write)
        self._run, self._loaded = run, loaded

    def prepare(self) -> None:
        """Shows what the base alone answers, which also encodes the prompts while the text encoder is there."""
        self._write(0)

    def _write(self, step: int) -> None:
        run, folder = self._run, self._run.folder
        run_files.add(folder.path, [f"previews/step-{step:06d}{ending}" for ending in (".png", ".tsv")])
        outputs = run.family.generate(self._loaded, run.requests)
        run.sample_type.save(outputs, run.config.preview, folder.previews_path / f"step-{step:06d}")


def hooks(run: CheckedRun, loaded: Loaded) -> list[Previews]:
    """Returns the previews of a run, if any are due in it."""
    return [Previews(run, loaded)] if run.requests else []
