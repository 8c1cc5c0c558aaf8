"""The whole way on the built-in Whisper: train new words in a new accent, transcribe before and after, report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion import workflows
from lora_diffusion.config.load import load
from lora_diffusion.config.schema import Config
from lora_diffusion.config.shipped import find_shipped
from lora_diffusion.core.files import shipped_path, write_json
from lora_diffusion.evaluation.text_page import TextPage, write_text_page
from lora_diffusion.evaluation.transcripts import Understanding

_SETS = {"new accent and words": "new", "old accents and words": "old"}
"""How a set of test recordings is called -> its folder in the sample set."""
_NUM_EXAMPLES = 12


@dataclass(frozen=True)
class WhisperResult:
    """What the quickstart left."""

    adapter: Path
    report: Path
    scores: Mapping[str, tuple[Understanding, Understanding]]
    """Set of recordings -> what the base understood, and what it did with the adapter."""
    next_commands: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "adapter": str(self.adapter),
            "report": str(self.report),
            "scores": _rates(self.scores),
            "next": list(self.next_commands),
            "seconds": round(self.seconds, 1),
        }

    def text(self) -> str:
        """Returns lines for people."""
        rows = [
            f"  {name:<26}{before.wer:6.1%} before, {after.wer:6.1%} after"
            for name, (before, after) in self.scores.items()
        ]
        lines = [
            f"Done in {self.seconds:.0f} s.",
            f"  adapter  {self.adapter}",
            f"  report   {self.report}",
            "Words that were misheard in recordings that were not trained on (WER):",
            *rows,
            "Try next:",
            *(f"  {command}" for command in self.next_commands),
        ]
        return "\n".join(lines)


def quickstart(output_path: Path, *, overwrite: bool = False) -> WhisperResult:
    """Trains the held-out accent and words of spoken-digits on the built-in base, and counts what it mishears.

    Raises:
        ConfigError: the folder holds another run and `overwrite` is not set.
    """
    started = time.perf_counter()
    data = shipped_path("datasets") / "spoken-digits"
    config = load(find_shipped("whisper/digits"), [f"data.path={data / 'train'}", f"output.path={output_path}"])
    trained = workflows.train(config, overwrite=overwrite)
    scores = compare(config, trained.files[0])
    write_json(output_path / "scores.json", _rates(scores))
    report_path, commands = output_path / "report.html", _next_commands(config, trained.files[0])
    seconds = time.perf_counter() - started
    training = workflows.read_training(output_path)
    facts = {**training.facts, "whole quickstart": f"{seconds:.0f} s"}
    page = _page(scores)
    write_text_page(report_path, page, training=replace(training, facts=facts), next_commands=commands)
    return WhisperResult(trained.files[0], report_path, scores, commands, seconds)


def compare(config: Config, adapter: Path) -> dict[str, tuple[Understanding, Understanding]]:
    """Returns what the base and the adapter understand of the test recordings of spoken-digits."""
    folders = [shipped_path("datasets") / "spoken-digits" / folder for folder in _SETS.values()]
    before = workflows.understand(config.model, folders)
    after = workflows.understand(config.model, folders, [(adapter, 1.0)])
    return dict(zip(_SETS, zip(before, after, strict=True), strict=True))


def _rates(scores: Mapping[str, tuple[Understanding, Understanding]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {"before": {"wer": before.wer, "cer": before.cer}, "after": {"wer": after.wer, "cer": after.cer}}
        for name, (before, after) in scores.items()
    }


def _page(scores: Mapping[str, tuple[Understanding, Understanding]]) -> TextPage:
    rows = [
        (name, len(before.recordings), before.wer, after.wer, before.cer, after.cer)
        for name, (before, after) in scores.items()
    ]
    examples = []
    for before, after in scores.values():
        heard = {one.key: one.heard for one in after.recordings}
        examples += [(one.said, one.heard, heard[one.key]) for one in before.recordings[:_NUM_EXAMPLES]]
    return TextPage(
        title="lora-diffusion quickstart: spoken digits",
        subtitle="The same recordings, transcribed before and after training; none of them was trained on.",
        score_names=("recordings", "number#", "WER before#", "WER after#", "CER before#", "CER after#"),
        scores=rows,
        about="Edits that turn what was heard into what was said, divided by the length of what was said: of words "
        "(WER) and of letters (CER). Lower is better. Both texts went through Whisper's normaliser.",
        example_names=("said", "heard by the base", "heard with the adapter"),
        examples=examples,
        about_examples="Of each set those that the base understood worst.",
    )


def _next_commands(config: Config, adapter: Path) -> tuple[str, ...]:
    file = shlex.quote(str(adapter))
    return (
        f"lora-diffusion transcribe --model {config.model.path} --adapter {file}:1 YOUR_RECORDING.wav",
        f"lora-diffusion inspect {file}",
        "lora-diffusion train --config whisper/digits data.path=YOUR_RECORDINGS output.path=my-words",
    )
