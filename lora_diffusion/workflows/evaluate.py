"""Which checkpoint, which weight, and is it any good: pictures and scores of adapters against the base alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.config.rules import MAX_DRAWING_STEPS, check_negative
from lora_diffusion.config.schema import Config, ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, sha256, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.metric import Metric
from lora_diffusion.core.text import name_some, suggestion
from lora_diffusion.data.preflight import find_images
from lora_diffusion.data.sample_types import IMAGES
from lora_diffusion.evaluation import gates, harness
from lora_diffusion.evaluation.harness import Task
from lora_diffusion.evaluation.results import BASE, Base, Candidate, Case, Evaluation, FileHash, Settings
from lora_diffusion.evaluation.suites import PLAIN_KINDS, check_used, read_cases
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.device import pick_device, process_group
from lora_diffusion.scoring.clip import default_clip, is_own_encoder
from lora_diffusion.scoring.scorers import LOADERS, Scorers
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _candidates
from lora_diffusion.workflows._candidates import Entry, Studio
from lora_diffusion.workflows._faults import Faults
from lora_diffusion.workflows._steps import find_family
from lora_diffusion.workflows.bases import find_model

if TYPE_CHECKING:
    import pandas as pd

Tried = Mapping[str, tuple[Entry, Candidate]]
"""Candidate, without the base -> what it is made of."""

_OPTIONS = {"references": "--references DIR", "training_pictures": "--training DIR"}
"""Field of Evidence -> the option that gives it."""


@dataclass(frozen=True)
class Question:
    """What an evaluation is asked. A path may be given as a text, and a text of several as itself."""

    output_path: Path
    """Folder of the result. Pictures that are there are not drawn again."""
    prompts: str | Path | Sequence[Case]
    """YAML file, name of a shipped suite, or cases."""
    model: ModelOptions | None = None
    """The base; None takes that of the run."""
    adapters: Sequence[str] = ()
    """FILE, FILE:WEIGHT, or several joined by + that are used together."""
    run: Path | None = None
    """Folder of a training run, whose checkpoints are compared."""
    weights: Sequence[float] = (1.0,)
    """Each adapter, checkpoint and composition is tried with its weights times each of these."""
    references: Path | None = None
    """Folder of real pictures of what was trained, other than those it was trained on."""
    training: Path | None = None
    """Folder of the training pictures; None takes that of the run, if it is there."""
    metrics: Sequence[str] = ()
    """Without any, all that can be computed from what is given."""
    scorers: Mapping[str, str] = field(default_factory=dict)
    """Kind -> model: "clip", "dino", "probe", and what metrics of other packages ask for."""
    seeds: Sequence[int] = (0, 1, 2, 3)
    """Each prompt is drawn once with each seed, with the same noise for all candidates."""
    triggers: Sequence[str] = ()
    """{trigger}, {trigger2}, ... of the prompts; without any, what the adapters say of themselves."""
    classes: Sequence[str] = ()
    """{class}, {class2}, ... of the prompts."""
    num_steps: int = 25
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance scale; 1 turns it off, None takes what suits the base."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None takes the base's own resolution."""
    negative: str = ""
    """What the pictures should not show."""
    cache_path: Path | None = None
    """Folder of pictures that evaluations share."""
    gates: Sequence[str] = ()
    """Conditions, see evaluation.gates. Their form is checked here; `check_gates` says which do not hold."""

    def __post_init__(self) -> None:
        """Makes paths of texts, and texts of paths, as the fields say."""
        own = {name: _path(getattr(self, name)) for name in _PATHS}
        own |= {name: _texts(getattr(self, name)) for name in _TEXTS}
        own["scorers"] = {kind: str(name) for kind, name in self.scorers.items()}
        for name, value in own.items():
            object.__setattr__(self, name, value)


_PATHS = ("output_path", "run", "references", "training", "cache_path")
_TEXTS = ("adapters", "metrics", "triggers", "classes", "gates")


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _texts(values: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(map(str, [values] if isinstance(values, str | Path) else values))


def evaluate(question: Question) -> Evaluation:
    """Draws what is missing, scores all, and writes the evaluation folder.

    Raises:
        InputError: anything that the user can mend, all of it at once; raised before the base is loaded.
    """
    faults, device = Faults(), pick_device()
    run = RunFolder(question.run) if question.run else None
    config = _config_of(run, faults)
    model = question.model or (config.model if config else None)
    if model is None:
        raise ConfigError("\n".join(faults or ["There is no base; give --model, --config or --run."]))
    family = find_family(model, IMAGES)
    info = _info(family, model, question.size, faults)
    entries = _entries(question, run, config, family, model, faults) if info else []
    tried = _tried(entries, question.weights, faults)
    told = [] if faults else _candidates.triggers(entries, run, config, family)
    cases = _cases(question, told, faults)
    references = _pictures(question.references, "--references", faults)
    training = _pictures(_training_folder(question, config), "--training", faults)
    scorers = Scorers({"clip": default_clip(model.path), **question.scorers}, device, encode=harness.encode_shared)
    given = {"base_pictures", *(["references"] if references else []), *(["training_pictures"] if training else [])}
    metrics = _metrics(question, cases, given, scorers, faults)
    _check_rest(question, tried, metrics, faults)
    faults += _unused_scorers(question, metrics)
    with faults.noted():
        check_negative(question.negative, _guidance(question, info) if info else None)
    faults.stop("evaluate")

    process_group().wait_for_everyone()  # all have looked into the folder before one writes into it
    use_threads("auto", question.output_path / "machine.json")
    loaded = family.load(model, device)
    task = Task(
        base=Base(info.source, info.architecture, family.architecture.name, _candidates.base_key(loaded)),
        candidates=[Candidate(BASE, None, None, None, {}, 0.0), *(candidate for _, candidate in tried.values())],
        looks=_candidates.looks(tried),
        adapters={source.name: source.file for entry in entries for source, _ in entry.parts},
        cases=cases,
        seeds=question.seeds,
        settings=Settings(question.num_steps, _guidance(question, info), question.size, question.negative),
        metrics=metrics,
        scorers={kind: scorers.names[kind] for metric in metrics for kind in metric.scorers},
        references=references,
        training_pictures=training,
        warnings=_warnings(references, training, scorers, info),
    )
    draw = Studio(family, loaded, tried).draw
    return harness.run(task, draw, scorers, question.output_path, question.cache_path)


@dataclass(frozen=True)
class GatedEvaluation:
    """An evaluation, and which of the conditions of `--assert` do not hold."""

    evaluation: Evaluation
    path: Path
    """Folder of the result."""
    failed: tuple[str, ...]
    """One line for each condition and candidate."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {**self.evaluation.to_json(), "failed": list(self.failed)}

    def text(self) -> str:
        """Returns lines for people."""
        return f"{self.evaluation.text()}\nScores and pictures are in {self.path}"


def check_gates(evaluation: Evaluation, path: Path, texts: Sequence[str]) -> GatedEvaluation:
    """Looks which conditions do not hold; `path` is the folder of the evaluation."""
    metrics, names = ([item.name for item in items] for items in (evaluation.metrics, evaluation.candidates))
    failed = gates.failures([gates.parse(text, metrics, names) for text in texts], evaluation)
    return GatedEvaluation(evaluation, path, tuple(failed))


def evaluate_as_table(model: str | Path | ModelOptions | None = None, **question: Any) -> pd.DataFrame:
    """Evaluates, and returns the lines of scores.csv as a table.

    Args:
        model: the base, by its path or as options; None takes that of `run`.
        question: fields of Question.
    """
    options = find_model(str(model)) if isinstance(model, str | Path) else model
    return evaluate(Question(model=options, **question)).table()


def _config_of(run: RunFolder | None, faults: Faults) -> Config | None:
    with faults.noted():
        return run.config() if run else None
    return None


def _info(family: Family, model: ModelOptions, size: tuple[int, int] | None, faults: Faults) -> BaseInfo:
    """Looks at the base; where there is a fault, what is returned is never used."""
    info: Any = None
    with faults.noted():
        info = family.check(model)
    if info and size and (size[0] % info.size_step or size[1] % info.size_step):
        faults.append(f"--size {size[0]}x{size[1]}: both sides must be multiples of {info.size_step} for this base.")
    return info  # type: ignore[no-any-return]


def _entries(
    question: Question,
    run: RunFolder | None,
    config: Config | None,
    family: Family,
    model: ModelOptions,
    faults: Faults,
) -> list[Entry]:
    num_faults = len(faults)
    entries = _candidates.from_files(question.adapters, family, model, faults)
    if run and config:
        entries += _candidates.from_run(run, faults)
    if not entries and len(faults) == num_faults:
        faults.append("There is nothing to evaluate: give --adapter FILE or --run RUN_DIR.")
    return entries


def _tried(entries: Sequence[Entry], weights: Sequence[float], faults: Faults) -> Tried:
    """Returns each entry at each weight."""
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad or not weights:
        faults.append(f"--weights {','.join(map(str, weights))}: must be numbers, say 0,0.5,1.")
        return {}
    tried: dict[str, tuple[Entry, Candidate]] = {}
    for entry in entries:
        for weight in weights:
            candidate = entry.candidate(weight)
            if candidate.name in tried:
                faults.append(f"{candidate.name} is asked for twice; give each adapter, and each weight, once.")
            tried[candidate.name] = entry, candidate
    return tried


def _cases(question: Question, told: Sequence[str], faults: Faults) -> Sequence[Case]:
    """Returns the cases; `told` are the triggers that the adapters tell."""
    if not isinstance(question.prompts, str | Path):
        return question.prompts
    triggers = question.triggers or told
    is_plain = not any("+" in text for text in question.adapters)
    if len(triggers) > 1 and is_plain and not question.triggers:
        faults.append(f"The adapters have different triggers ({', '.join(triggers)}); give --trigger WORDS.")
    with faults.noted():
        # Where there are faults, that no adapter told its trigger may follow from them.
        cases = read_cases(question.prompts, triggers or (["trigger"] if faults else []), question.classes)
        faults += check_used(question.prompts, question.triggers, question.classes)
        return cases
    return ()


def _training_folder(question: Question, config: Config | None) -> Path | None:
    if question.training or not config:
        return question.training
    folder = user_path(config.data.path, "data.path")
    if folder.is_dir():
        return folder
    logger.warning("The training pictures of the run are not at %s any more; give --training DIR.", folder)
    return None


def _pictures(folder: Path | None, option: str, faults: Faults) -> list[FileHash]:
    """Returns the pictures of a folder and its subfolders, all of which can be read."""
    if folder is None:
        return []
    with faults.noted():
        return [FileHash(str(path), sha256(path)) for path in find_images(str(folder), option)]
    return []


def _metrics(
    question: Question, cases: Sequence[Case], given: set[str], scorers: Scorers, faults: Faults
) -> list[Metric]:
    """Returns the metrics that were asked for, or all that can be computed, with their models loaded."""
    metrics = []
    left_out = []
    for name in dict.fromkeys(question.metrics or registry.available("metrics")):
        with faults.noted():
            metric: Metric = registry.find("metrics", name)
            lack = _lack(metric, question, cases, given, scorers)
            if lack and question.metrics:
                raise ConfigError(f"--metrics {name} {lack}.")
            left_out += [f"{name} ({lack})"] if lack and metric.judges != "answers" else []
            metrics += [] if lack else [metric]
    if left_out:
        logger.info("Metrics that are left out: %s", ", ".join(left_out))
    for kind in dict.fromkeys(kind for metric in metrics for kind in metric.scorers if kind in LOADERS):
        with faults.noted():
            scorers.find(kind)
    return metrics


def _lack(metric: Metric, question: Question, cases: Sequence[Case], given: set[str], scorers: Scorers) -> str | None:
    """Says why a metric cannot be computed, or None."""
    if metric.judges == "answers":
        return "judges texts, not pictures"
    missing = [_OPTIONS.get(name, name) for name in sorted(metric.needs - given)]
    missing += [f"--scorer {kind}=NAME" for kind in metric.scorers if kind not in scorers.names]
    if missing:
        return f"needs {' and '.join(missing)}"
    if metric.per_prompt and len(question.seeds) < 2:
        return "needs two seeds or more"
    wants_plain = metric.judges == "plain"
    if cases and not any((case.kind in PLAIN_KINDS) == wants_plain for case in cases):
        return f"needs prompts of kind {' or '.join(sorted(PLAIN_KINDS)) if wants_plain else 'subject, style, ...'}"
    return None


def _unused_scorers(question: Question, metrics: Sequence[Metric]) -> list[str]:
    """Returns an error for each scoring model of the user that no metric asks for."""
    known: dict[str, list[str]] = defaultdict(list)
    for name in registry.available("metrics"):
        for kind in registry.find("metrics", name).scorers:
            known[kind].append(name)
    used = {kind for metric in metrics for kind in metric.scorers}
    errors = []
    for kind, model in question.scorers.items():
        if kind not in known:
            errors.append(
                f"--scorer {kind}={model}: no metric asks for such a model; use one of {', '.join(sorted(known))}"
                f"{suggestion(kind, list(known))}."
            )
        elif kind not in used:
            option = f"--clip {model}" if kind == "clip" else f"--scorer {kind}={model}"
            errors.append(f"{option} does nothing: none of its metrics is computed ({', '.join(known[kind])}).")
    return errors


def _guidance(question: Question, info: BaseInfo) -> float:
    return info.guidance if question.guidance is None else question.guidance


def _check_rest(question: Question, tried: Tried, metrics: Sequence[Metric], faults: Faults) -> None:
    if not question.seeds or len(set(question.seeds)) < len(question.seeds):
        faults.append(f"--seed {' '.join(map(str, question.seeds))}: give each seed once, and at least one.")
    faults += [
        f"--seed {seed}: must be 0 or greater, and less than 2^63." for seed in question.seeds if not 0 <= seed < 2**63
    ]
    if not 1 <= question.num_steps <= MAX_DRAWING_STEPS:
        faults.append(f"--steps {question.num_steps}: must be from 1 to {MAX_DRAWING_STEPS}.")
    if question.guidance is not None and not 1 <= question.guidance < math.inf:
        faults.append(f"--guidance {question.guidance:g}: must be 1 (off) or greater.")
    for text in question.gates:
        with faults.noted():
            gates.parse(text, [metric.name for metric in metrics], [BASE, *tried])
    for folder, option in ((question.output_path, "--output"), (question.cache_path, "--cache")):
        with faults.noted():
            if folder is not None:
                check_writable(folder, option)
    others = [path.name for path in question.output_path.iterdir()] if question.output_path.is_dir() else []
    if others and not {"evaluation.json", harness.PICTURES, "machine.json"} & {*others}:
        faults.append(f"--output {question.output_path} holds other files; give a new folder, or one of an evaluation.")


def _warnings(
    references: Sequence[FileHash], training: Sequence[FileHash], scorers: Scorers, info: BaseInfo
) -> list[str]:
    found = []
    trained = {file.sha256 for file in training}
    shared = [Path(file.path).name for file in references if file.sha256 in trained]
    if shared:
        found.append(
            f"{len(shared)} of {len(references)} references are training pictures ({name_some(shared)}), so likeness "
            "to them rewards copying; give pictures that were not trained on."
        )
    if is_own_encoder(scorers.names["clip"], info.architecture):
        found.append(
            f"The base reads its prompts with the very CLIP that scores its pictures ({scorers.names['clip']}), so "
            "clip_text flatters it; give another --clip."
        )
    return found
