"""Pages that show what a run or an evaluation came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_diffusion.config.describe import differences
from lora_diffusion.config.load import load
from lora_diffusion.config.schema import Config
from lora_diffusion.core.errors import ConfigError, DataError, RunError
from lora_diffusion.core.files import check_writable
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Evaluation, Table
from lora_diffusion.evaluation.select import Preference, choose
from lora_diffusion.report import comparison_page
from lora_diffusion.report.report_page import Training, write_report
from lora_diffusion.report.sections import Findings
from lora_diffusion.training import run_files
from lora_diffusion.training.image_losses import read_losses
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.training.tracking import PROGRESS_NAME, read_held_out, read_metrics
from lora_diffusion.workflows.select import EVALUATION_NAME, Selection, read_selection


@dataclass(frozen=True)
class Report:
    """A page, and its numbers beside it."""

    page: Path
    numbers: tuple[Path, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"page": str(self.page), "numbers": list(map(str, self.numbers))}

    def text(self) -> str:
        """Returns lines for people."""
        return f"Open {self.page} in a browser; its numbers are beside it."


def report(paths: Sequence[Path], output_path: Path | None = None) -> Report:
    """Writes a page about one run or evaluation, or one that compares several.

    Args:
        paths: run folders, evaluation folders, or both.
        output_path: the HTML file; None takes report.html in the folder, or comparison.html where there are several.

    Raises:
        InputError: a folder holds neither a run nor an evaluation, or the output cannot be written.
    """
    output = output_path or (paths[0] / "report.html" if len(paths) == 1 else Path("comparison.html"))
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output {output}: name a file that ends in .html.")
    check_writable(output.absolute().parent, "--output")
    chosen = {path: read_selection(path) for path in paths}
    for path, selection in chosen.items():
        _check(path, selection)
    if len(paths) > 1:
        entries = [comparison_page.Entry(_name(path), *_findings(path, chosen[path])) for path in paths]
        page, *numbers = comparison_page.write_comparison(output, entries)
        return Report(page, tuple(numbers))
    path = paths[0]
    findings, training = _findings(path, chosen[path])
    if output.parent.resolve() == path.resolve():
        run_files.add(path, [output.with_suffix(ending).name for ending in (output.suffix, ".json", ".csv")])
    page, *numbers = write_report(
        output,
        title=f"{'Evaluation of' if findings else 'Training of'} {_name(path)}",
        findings=findings,
        training=training,
        chosen_file=_chosen_file(chosen[path], findings),
    )
    return Report(page, tuple(numbers))


def _chosen_file(selection: Selection | None, findings: Findings | None) -> str | None:
    """Returns the file that `select` wrote, unless the page now leads to another choice."""
    choice = findings.choice if findings else None
    if selection is None or choice is None or choice.candidate.name != selection.candidate:
        return None
    return str(selection.file)


def read_training(run_path: Path) -> Training:
    """Returns what is known of the training of a run; nothing where the folder is no run."""
    run = RunFolder(run_path)
    if not run.config_path.is_file():
        return Training()
    losses = [replace(loss, path=run.find(loss.path)) for loss in read_losses(run.path)]
    return Training(
        metrics=read_metrics(run.path),
        losses=losses,
        facts=_settings(run.config()),
        held_out=read_held_out(run.path / PROGRESS_NAME),
    )


def _settings(config: Config) -> dict[str, str]:
    """Returns the settings that differ from the defaults."""
    default = load(None, [f"model.family={config.model.family}"], required=False)
    changed = (line.split(": ", 1) for line in differences(default, config))
    return {key: values.split(" -> ", 1)[1] for key, values in changed}


def _name(path: Path) -> str:
    return path.resolve().name


def _check(path: Path, selection: Selection | None) -> None:
    if not (_evaluation_folder(path, selection) or RunFolder(path).config_path.is_file()):
        raise ConfigError(
            f"{path} holds neither a run (config.yaml) nor an evaluation (evaluation.json); name a folder that 'train' "
            "or 'evaluate' wrote."
        )


def _evaluation_folder(path: Path, selection: Selection | None) -> Path | None:
    """Returns the folder itself, else that which `select` chose from, else that of the run."""
    folders = [path, *([selection.evaluation] if selection else []), path / EVALUATION_NAME]
    return next((folder for folder in folders if (folder / "evaluation.json").is_file()), None)


def _located(evaluation: Evaluation, run: RunFolder) -> Evaluation:
    """Returns an evaluation of a run whose images can be opened from here, too."""
    if not run.config_path.is_file():
        return evaluation
    files = {file.path for file in (*evaluation.references, *evaluation.training_images)}
    places = {text: run.find(text) for text in {*files, *(score.detail for score in evaluation.scores if score.detail)}}
    return replace(
        evaluation,
        references=[replace(file, path=places[file.path]) for file in evaluation.references],
        training_images=[replace(file, path=places[file.path]) for file in evaluation.training_images],
        scores=[replace(score, detail=places.get(score.detail, "")) for score in evaluation.scores],
    )


def _findings(path: Path, selection: Selection | None) -> tuple[Findings | None, Training]:
    folder, training = _evaluation_folder(path, selection), read_training(path)
    if folder is None:
        return None, training
    evaluation = _located(results.read(folder), RunFolder(path))
    try:
        choice = choose(evaluation, selection.preference if selection else Preference())
    except (DataError, ConfigError, RunError):
        choice = None  # the page then shows the evaluation without a choice
    return Findings(evaluation, folder, choice, Table(evaluation)), training
