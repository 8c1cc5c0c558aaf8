"""The best checkpoint and weight of a run, marked and linked."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from lora_diffusion.adapters import variants
from lora_diffusion.config.schema import Config
from lora_diffusion.core import registry
from lora_diffusion.core.adapter_state import AdapterState
from lora_diffusion.core.errors import ConfigError, DataError
from lora_diffusion.core.files import atomic_path, read_json, sha256, user_path, write_json
from lora_diffusion.core.logs import logger
from lora_diffusion.core.privacy import public_path
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.core.protocols.metric import Metric
from lora_diffusion.core.text import name_some, suggestion
from lora_diffusion.core.version import __version__
from lora_diffusion.data import image_folder
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Candidate, Case, Evaluation, Table
from lora_diffusion.evaluation.select import Choice, choose
from lora_diffusion.evaluation.select import Preference as Preference
from lora_diffusion.evaluation.suites import check_used, control_prompts, read_cases
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.training import run_files
from lora_diffusion.training.checkpoint import saved_steps
from lora_diffusion.training.record import at_step
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._base_and_adapters import read_adapter
from lora_diffusion.workflows._run_checkpoints import RunCheckpoint
from lora_diffusion.workflows.evaluate import EvaluationRequest, evaluate

EVALUATION_NAME = "evaluation"
SELECTION_NAME, BEST_NAME = run_files.CHOICE
_MAX_CONCEPT, _MAX_CONTROL = 12, 4
"""Prompts that are made from the captions of references."""


@dataclass(frozen=True)
class Selection:
    """What was chosen, and where it is."""

    file: Path
    """The adapter of the chosen checkpoint, whose metadata hold the weight and the scores."""
    best: Path
    """Link to the file."""
    weight: float
    preference: Preference
    why: str
    candidate: str
    """Its name in the evaluation."""
    evaluation: Path
    """Folder of the evaluation that it was chosen from."""
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        paths = {name: str(getattr(self, name)) for name in ("file", "best", "evaluation")}
        return {**vars(self), **paths, "preference": vars(self.preference)}

    def text(self) -> str:
        """Returns lines for people."""
        lines = [self.why, f"Use {self.best} (that is {self.file.name}) at weight {self.weight:g}."]
        if self.warnings:
            more = f" (+{len(self.warnings) - 1} more in 'lora-diffusion report {self.best.parent}')"
            lines.append(f"Mind: {self.warnings[0]}{more if len(self.warnings) > 1 else ''}")
        return "\n".join(lines)


def select(
    run_path: Path,
    evaluation_path: Path | None = None,
    preference: Preference | None = None,
    overrides: Sequence[str] = (),
) -> Selection:
    """Chooses checkpoint and weight, writes the adapter with marks in its metadata, and links it as best.safetensors.

    Args:
        run_path: a finished run.
        evaluation_path: evaluation of its checkpoints; None makes that in the run folder again, as the run's `evaluate`
            section says, with the images that are there. If the section names no references, one that is there is
            taken as it is.
        preference: limits and weighting that differ from the defaults.
        overrides: "evaluate.key=value" for this evaluation.

    Raises:
        InputError: no finished run, or an evaluation that is of other adapters or allows no choice.
    """
    if evaluation_path and overrides:
        raise ConfigError(
            f"{overrides[0]} does nothing beside --evaluation {evaluation_path}, which is there already; drop one of "
            "the two."
        )
    run, preference = RunFolder(run_path), preference or Preference()
    config = run.config(overrides)
    check_name(run.name(config))
    final = run.find_adapter(config)
    folder = evaluation_path or run.path / EVALUATION_NAME
    has_evaluation = (folder / "evaluation.json").is_file()
    if evaluation_path is None and (config.evaluate.references or overrides or not has_evaluation):
        evaluate(evaluation_request(run, config, folder))
    evaluation = results.read(folder)
    choice = choose(evaluation, preference)
    undecided = filter(None, [results.undecided_line(evaluation.open_comparisons)])
    choice = replace(choice, warnings=(*choice.warnings, *evaluation.warnings, *_unseen(run, evaluation), *undecided))
    checkpoint = _checkpoint(run, choice.candidate, folder)
    if PartialState().is_main_process:
        file = _write(run, config, final, checkpoint, choice, evaluation)
        _record(run, file, folder, choice, preference)
    PartialState().wait_for_everyone()
    return _required(read_selection(run.path))


def _unseen(run: RunFolder, evaluation: Evaluation) -> list[str]:
    steps = saved_steps(run.path).keys() - {candidate.step for candidate in evaluation.candidates}
    if not steps:
        return []
    names = name_some([f"step-{step:06d}" for step in sorted(steps)])
    return [f"{names} of the run came after the evaluation and were not looked at; evaluate again to compare them."]


def read_selection(run_path: Path) -> Selection | None:
    """Returns what `select` chose in a run; None if it did not, or, with a warning, if the file is damaged."""
    path = run_path / SELECTION_NAME
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        return Selection(
            run_path / values["file"],
            run_path / BEST_NAME,
            float(values["weight"]),
            Preference(**values["preference"]),
            str(values["why"]),
            str(values["candidate"]),
            run_path / values.get("evaluation", EVALUATION_NAME),  # earlier versions do not say it
            tuple(values["warnings"]),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        logger.warning("%s is damaged and left out (%r); select again.", path, error)
        return None


def check_name(name: str) -> None:
    """Checks that the link does not take the place of the run's own adapter.

    Raises:
        ConfigError: it would.
    """
    if f"{name}.safetensors" == BEST_NAME:
        raise ConfigError(f"output.name={name}: {BEST_NAME} is the link to the chosen file; give another output.name.")


def evaluation_request(run: RunFolder, config: Config, folder: Path) -> EvaluationRequest:
    """Returns how a run's checkpoints are evaluated, as its `evaluate` section says.

    Raises:
        ConfigError: the section names no references.
    """
    settings = config.evaluate
    if not settings.references:
        raise ConfigError(
            f"{folder} holds no evaluation, and the run's config names no images to compare with; add "
            f"evaluate.references=DIR, or run 'lora-diffusion evaluate --run {run.path} --output {folder}' with what "
            "you want to know."
        )
    family: Family = registry.find("families", config.model.family)
    trigger = read_adapter(run.find_adapter(config), family, config.model).metadata.get("modelspec.trigger_phrase", "")
    return EvaluationRequest(
        output_path=folder,
        prompts=cases(config, trigger),
        run=run.path,
        weights=settings.weights,
        references=user_path(settings.references, "evaluate.references"),
        metrics=settings.metrics,
        scorers=scorers(config),
        seeds=settings.seeds,
        num_steps=config.preview.num_steps,
        guidance=config.preview.guidance,
        negative=config.preview.negative,
    )


def scorers(config: Config) -> dict[str, str]:
    """Returns the models that `evaluate.clip` and `evaluate.scorers` name, by their role.

    Raises:
        ConfigError: an entry names no model, or a role that no metric asks for; or a metric of `evaluate.metrics` asks
            for one that is not named.
    """
    settings = config.evaluate
    metrics: dict[str, Metric] = {name: registry.find("metrics", name) for name in registry.available("metrics")}
    roles = sorted({role for metric in metrics.values() for role in metric.scorers} - {"clip"})
    named = {"clip": settings.clip} if settings.clip else {}
    for text in settings.scorers:
        role, _, name = text.partition("=")
        if role not in roles or not name:
            raise ConfigError(
                f"evaluate.scorers: {text!r} does not give a model to one of {', '.join(roles)}"
                f"{suggestion(role, roles)}, as in dino=FOLDER; the CLIP is evaluate.clip."
            )
        named[role] = name
    for metric in settings.metrics:
        lacking = [role for role in registry.find("metrics", metric).scorers if role not in {"clip", *named}]
        if lacking:
            raise ConfigError(f"evaluate.metrics: {metric} needs a model; add evaluate.scorers=[{lacking[0]}=NAME].")
    return named


def cases(config: Config, trigger: str) -> tuple[Case, ...]:
    """Returns the prompts of `evaluate.prompts`, else the captions of the references, with the trigger and without.

    Raises:
        ConfigError: no prompt would ask for what is trained, or the suite is wrong.
    """
    settings = config.evaluate
    if settings.prompts:
        classes = [settings.class_words] if settings.class_words else []
        suite = read_cases(settings.prompts, [trigger] if trigger else [], classes, setting="evaluate.prompts=")
        if unused := check_used(settings.prompts, [], classes, setting="evaluate.prompts="):
            raise ConfigError(f"evaluate.class_words={unused[0]}")
        return suite
    family: Family = registry.find("families", config.model.family)
    data = replace(config.data, path=str(settings.references), trigger="", captions="required", flip=False)
    try:
        captions = [sample.captions[0] for sample in image_folder.read(data, family.check(config.model))]
    except DataError as error:
        raise DataError(
            f"evaluate.references={settings.references}: its captions would be the prompts; correct them, or name a "
            "suite with evaluate.prompts (configs/evaluate).",
            error.errors,
        ) from error
    both = dict.fromkeys(zip(captions, control_prompts(captions, trigger), strict=True))
    pairs = [(caption, control) for caption, control in both if caption != control or not trigger]
    if not pairs:
        raise ConfigError(
            f"evaluate.references={settings.references}: none of the captions holds the trigger words {trigger!r}, so "
            "they are no prompts for what is trained; name a suite with evaluate.prompts (configs/evaluate)."
        )
    texts = [(caption, control, "subject") for caption, control in pairs[:_MAX_CONCEPT]]
    if trigger:
        texts += [(control, control, "prior") for control in [*dict.fromkeys(text for _, text in pairs)][:_MAX_CONTROL]]
    return tuple(Case(i, text, control, control, group, "references") for i, (text, control, group) in enumerate(texts))


def _checkpoint(run: RunFolder, candidate: Candidate, folder: Path) -> Path:
    """Returns the checkpoint of a candidate, which must be this run's and unchanged."""
    path = None if candidate.step is None else run.path / "checkpoints" / f"step-{candidate.step:06d}"
    if path is None or not path.is_dir() or sha256(path / "adapter.safetensors") != candidate.sha256:
        raise ConfigError(
            f"{folder} chose {candidate.name}, which is no checkpoint of {run.path} as it is now; evaluate again with "
            f"'lora-diffusion evaluate --run {run.path}', and keep the checkpoints (train.keep_checkpoints=0)."
        )
    return path


def _write(
    run: RunFolder,
    config: Config,
    final: Path,
    checkpoint: Path,
    choice: Choice,
    evaluation: Evaluation,
) -> Path:
    """Writes the marked file in place of an earlier one, and returns it."""
    family: Family = registry.find("families", config.model.family)
    finished = read_adapter(final, family, config.model)
    is_final = final.is_file() and finished.metadata.get("ss_steps") == str(choice.candidate.step)
    name = final.name if is_final else f"{run.name(config)}-{checkpoint.name}.safetensors"
    state = finished if is_final else _run_checkpoints.read(RunCheckpoint(checkpoint))[1]
    metadata = dict(finished.metadata)
    if not is_final:
        metadata = at_step(metadata, int(str(choice.candidate.step)), Path(name).stem, time.time())
        metadata["modelspec.title"] = Path(name).stem
    metadata |= marks(choice, evaluation)
    path = run.path / name
    run_files.claim(run.path, [*run_files.CHOICE, *([] if is_final else [name])], f"select {run.path}")
    format_name = detect(parse_file(final)) if is_final else _format_name(config)
    _write_adapter(AdapterState(state.modules, metadata), family, config, path, format_name)
    chosen = {name for name in run_files.written(run.path) if run_files.CHOSEN.fullmatch(name)}
    run_files.discard(run.path, chosen - {name})
    return path


def _record(run: RunFolder, file: Path, folder: Path, choice: Choice, preference: Preference) -> None:
    """Writes what was chosen and from which evaluation, then the link."""
    outer, inner = run.path.resolve(), folder.resolve()
    values = {
        "file": file.name,
        # A run may be moved along with what is inside it.
        "evaluation": (inner.relative_to(outer) if inner.is_relative_to(outer) else inner).as_posix(),
        "preference": dataclasses.asdict(preference),
        **choice.to_json(),
        "lora_diffusion": __version__,
    }
    write_json(run.path / SELECTION_NAME, values)
    with atomic_path(run.path / BEST_NAME) as temporary:
        try:
            temporary.symlink_to(file.name)
        except OSError:  # file systems and accounts without links
            shutil.copyfile(file, temporary)


def _format_name(config: Config) -> str:
    """Names the first format of one file that can hold what was trained; those that the run was to write come first."""
    stored = variants.find(config.adapter.variant, config.model.quantization).stored
    formats = [registry.find("formats", name) for name in (*config.output.formats, *registry.available("formats"))]
    return next(str(format_.name) for format_ in formats if not format_.is_folder and stored not in format_.refused)


def marks(choice: Choice, evaluation: Evaluation) -> dict[str, str]:
    """Returns the metadata that a chosen file gets: weight, scores, and what they were measured with."""
    table, weight = Table(evaluation), f"{choice.candidate.weight:g}"
    metrics = [facts.name for facts in evaluation.metrics if table.has(facts.name)]
    return {
        "modelspec.usage_hint": f"weight {weight}",
        "lora_diffusion.recommended_weight": weight,
        "lora_diffusion.scores": json.dumps(
            {metric: round(table.mean(choice.candidate.name, metric), 4) for metric in metrics}
        ),
        "lora_diffusion.scorer": json.dumps({role: public_path(name) for role, name in evaluation.scorer.items()}),
        "lora_diffusion.evaluated_with": evaluation.lora_diffusion,
    }


def _write_adapter(state: AdapterState, family: Family, config: Config, path: Path, format_name: str) -> None:
    format_: Format = registry.find("formats", format_name)
    dtype = find_dtype(config.output.dtype)
    write_verified(state, family.key_map(format_name, config.model), format_, path, dtype)


def _required(selection: Selection | None) -> Selection:
    assert selection is not None, "select has just written it"
    return selection
