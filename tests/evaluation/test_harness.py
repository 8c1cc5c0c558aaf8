"""A whole evaluation without a base and without a scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.samples import Output, Request
from lora_diffusion.evaluation import harness, results
from lora_diffusion.evaluation.results import Base, Candidate, Case, Settings, Table
from lora_diffusion.scoring.scorers import Scorers


class Redness:
    """A metric of another package."""

    name, meaning, higher_is_better = "redness", "how red images are that nobody asked to be", False
    outputs, needs, scorers, per_prompt = "control", frozenset[str](), (), False

    def score(self, evidence: Evidence) -> Scores:
        reds = [Image.open(str(path)).getpixel((0, 0))[0] for path in evidence.images]  # type: ignore[index]
        return Scores(torch.tensor(reds, dtype=torch.float32))

    def random_baseline(self, evidence: Evidence) -> None:
        del evidence

    def reference_score(self, evidence: Evidence) -> None:
        del evidence


def _generate(candidate: str, requests: Sequence[Request]) -> list[Output]:
    return [Output(request, Image.new("RGB", (8, 8), (len(candidate), 0, 0))) for request in requests]


def _task() -> harness.Task:
    cases = [Case(index, f"p {index}", "p", "p", kind, "s") for index, kind in enumerate(("subject", "leak", "leak"))]
    return harness.Task(
        base=Base("x", "x", "x", "key"),
        candidates=[Candidate("base", None, None, None, {}, 0.0), Candidate("a@1.0", "a", "0", None, {"a": 1.0}, 1.0)],
        looks={"base": (), "a@1.0": (("0", 1.0),)},
        adapters={},
        cases=cases,
        seeds=(0, 1),
        settings=Settings(2, 3.0, None, ""),
        metrics=[Redness()],
        scorers={},
    )


def test_tells_what_it_was_made_with_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "pictures"):
        folder.mkdir(exist_ok=True)
        (folder / ".part-0000-left.png").touch()
    found = harness.run(_task(), _generate, Scorers({}), tmp_path)
    assert not list(tmp_path.rglob(".part-*"))
    assert len(list((tmp_path / "pictures").iterdir())) == 2 * 3 * 2
    assert found.base.base_key == "key"
    assert found.versions.keys() == {"torch", "diffusers", "transformers", "open_clip_torch"}
    assert found.versions["torch"] == torch.__version__.split("+")[0] or found.versions["torch"] == torch.__version__
    assert found.metrics[0].judges == "plain"
    assert Table(results.read(tmp_path)).mean("a@1.0", "redness") == 5


def test_files_that_another_process_is_writing_are_no_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, written = tmp_path / ".part-0000-machine.json", tmp_path / "machine.json"
    writing.touch()

    def wait() -> None:
        if not written.exists():
            writing.rename(written)

    alone = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=wait)
    monkeypatch.setattr(harness, "process_group", lambda: alone)
    harness.run(_task(), _generate, Scorers({}), tmp_path)
    assert written.exists()
