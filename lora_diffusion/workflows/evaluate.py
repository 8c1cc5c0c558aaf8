"""Which checkpoint, which weight, and is it any good: images and scores of adapters against the base alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.config.rules import check_negative
from lora_diffusion.config.schema import Config, ModelOptions
from lora_diffusion.config.settings import MAX_DENOISING_STEPS
from lora_diffusion.core import registry
from lora_diffusion.core.base_model import Architecture, BaseInfo
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import check_writable, sha256, user_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.metric import Metric
from lora_diffusion.core.samples import Request
from lora_diffusion.core.text import name_some, suggestion
from lora_diffusion.data import image_folder
from lora_diffusion.data.images import open_rgb
from lora_diffusion.data.preflight import find_images
from lora_diffusion.data.sample_types import IMAGES
from lora_diffusion.evaluation import concepts, gates, harness
from lora_diffusion.evaluation.concepts import NamedConcept
from lora_diffusion.evaluation.harness import Comparison, PromptGrid, Task
from lora_diffusion.evaluation.references import read_captions
from lora_diffusion.evaluation.results import (
    BASE,
    CONTROL_GROUPS,
    Base,
    Candidate,
    Case,
    Evaluation,
    FileHash,
    Settings,
)
from lora_diffusion.evaluation.suites import check_used, control_prompts, read_cases
from lora_diffusion.runtime.autotune import use_threads
from lora_diffusion.runtime.device import pick_device, process_group
from lora_diffusion.scoring.clip import BUILTIN, default_clip, is_encoder_of_base
from lora_diffusion.scoring.scorers import LOADERS, Scorers
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _candidates
from lora_diffusion.workflows._base_and_adapters import attach, find_family, read_adapter
from lora_diffusion.workflows._candidates import CandidateSampler, Entry
from lora_diffusion.workflows._errors import Errors
from lora_diffusion.workflows.bases import find_model

if TYPE_CHECKING:
    import pandas as pd

Candidates = Mapping[str, tuple[Entry, Candidate]]
"""Candidate, without the base -> its adapters with their weights."""

_OPTIONS = {
    "references": "--references DIR",
    "reference_captions": "captions beside the images of --references",
    "training_images": "--training DIR",
    "concepts": "--concept subject:TRIGGER=DIR",
}
"""Field of Evidence -> the option that gives it."""


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how. A path may be given as a text, and a text of several as itself."""

    output_path: Path
    """Folder of the result. Images that are there are not generated again."""
    prompts: str | Path | Sequence[Case]
    """YAML file, name of a shipped suite, or cases."""
    model: ModelOptions | None = None
    """The base; None takes that of the run."""
    adapters: Sequence[str] = ()
    """FILE, FILE:WEIGHT, or several joined by + that are used together."""
    run: Path | None = None
    """Folder of a training run, whose checkpoints are compared."""
    weights: Sequence[float] = (1.0,)
    """Each adapter, checkpoint and composition is candidates with its weights times each of these."""
    references: Path | None = None
    """Folder of real images of what was trained, other than those it was trained on."""
    training: Path | None = None
    """Folder of the training images; None takes that of the run, if it is there."""
    concepts: Sequence[str] = ()
    """subject:TRIGGER=FOLDER or style:TRIGGER=FOLDER, of each concept that a composition is to show."""
    metrics: Sequence[str] = ()
    """Without any, all that can be computed from what is given."""
    scorers: Mapping[str, str] = field(default_factory=dict)
    """Role -> model: "clip", "dino", "probe", and what metrics of other packages ask for."""
    seeds: Sequence[int] = (0, 1, 2, 3)
    """Each prompt is generated once with each seed, from the same noise for all candidates."""
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
    """What the images should not show."""
    cache_path: Path | None = None
    """Folder of images that evaluations share."""
    gates: Sequence[str] = ()
    """Conditions, see evaluation.gates. Their form is checked here; `check_gates` says which do not hold."""

    def __post_init__(self) -> None:
        """Makes paths of texts, and texts of paths, as the fields say."""
        values: dict[str, Any] = {name: _path(getattr(self, name)) for name in _PATHS}
        values |= {name: _texts(getattr(self, name)) for name in _TEXTS}
        values["scorers"] = {role: str(name) for role, name in self.scorers.items()}
        for name, value in values.items():
            object.__setattr__(self, name, value)


_PATHS = ("output_path", "run", "references", "training", "cache_path")
_TEXTS = ("adapters", "concepts", "metrics", "triggers", "classes", "gates")


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def _texts(values: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(map(str, [values] if isinstance(values, str | Path) else values))


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Generates what is missing, scores all, and writes the evaluation folder.

    Raises:
        InputError: anything that the user can correct, all of it at once; raised before the base is loaded.
    """
    errors, device = Errors(), pick_device()
    run = RunFolder(request.run) if request.run else None
    config = _config_of(run, errors)
    model = request.model or (config.model if config else None)
    if model is None:
        raise ConfigError("\n".join(errors or ["There is no base; give --model, --config or --run."]))
    family = find_family(model, IMAGES)
    info = _info(family, model, request.size, errors)
    entries = _entries(request, run, config, family, model, errors) if info else []
    candidates = _weighted(entries, request.weights, errors)
    triggers = [] if errors else _candidates.triggers(entries, run, config, family)
    cases = _cases(request, triggers, errors)
    references = _images(request.references, "--references", errors)
    captions = _captions(request.references, references, request.triggers or triggers)
    named = _concepts(request, cases, candidates, request.triggers or triggers, errors)
    training = _images(_training_folder(request, config), "--training", errors)
    scorers = Scorers({"clip": default_clip(model.path), **request.scorers}, device, encode=harness.encode_shared)
    optional = {
        "concepts": named,
        "references": references,
        "reference_captions": captions,
        "training_images": training,
    }
    given = {"base_images", "base_references", *(name for name, items in optional.items() if items)}
    given |= {"concepts"} if named else set()
    metrics = _metrics(request, cases, given, scorers, errors)
    _check_rest(request, candidates, metrics, errors)
    errors += _unused_scorers(request, metrics)
    with errors.noted():
        check_negative(request.negative, _guidance(request, info) if info else None)
    errors.stop("evaluate")

    process_group().wait_for_everyone()  # all have looked into the folder before one writes into it
    use_threads("auto", request.output_path / "machine.json")
    loaded = family.load(model, device)
    task = Task(
        base=Base(info.source, info.architecture, family.architecture.name, _candidates.base_key(loaded)),
        candidates=[Candidate(BASE, None, None, None, {}, 0.0), *(candidate for _, candidate in candidates.values())],
        looks=_candidates.looks(candidates),
        adapters={source.name: source.file for entry in entries for source, _ in entry.parts},
        cases=cases,
        seeds=request.seeds,
        settings=Settings(request.num_steps, _guidance(request, info), request.size, request.negative),
        metrics=metrics,
        scorers={role: scorers.names[role] for metric in metrics for role in metric.scorers},
        references=references,
        reference_captions=captions,
        training_images=training,
        concepts=named,
        warnings=_warnings(references, training, scorers, family.architecture),
    )
    sampler = CandidateSampler(family, loaded, candidates)
    return harness.run(task, sampler.generate, scorers, request.output_path, request.cache_path)


def compare_with_base(
    config: Config,
    adapter_path: Path,
    references_path: Path,
    template: Request,
    cases: Sequence[Case] = (),
    seeds: Sequence[int] = (0,),
) -> Comparison:
    """Generates and scores with one adapter file and without it, and leaves nothing on the disk.

    Args:
        config: gives the base, and how captions are read.
        adapter_path: adapter file.
        references_path: folder of captioned images that were not trained on.
        template: steps, guidance, size and negative prompt of every image.
        cases: what to generate; without any, the captions of the references.
        seeds: each case is generated once with each seed.
    """
    family: Family = registry.find("families", config.model.family)
    info = family.check(config.model)
    samples = image_folder.read(replace(config.data, path=str(references_path), trigger="", flip=False), info)
    state = read_adapter(adapter_path, family, config.model)
    captions = [sample.captions[0] for sample in samples]
    controls = control_prompts(captions, state.metadata.get("modelspec.trigger_phrase", ""))
    pairs = zip(captions, controls, strict=True)
    cases = cases or [Case(i, text, plain, plain, "subject", "references") for i, (text, plain) in enumerate(pairs)]
    use_threads(config.train.threads)
    loaded = family.load(config.model, pick_device())
    (name,) = attach(loaded, [state], [1.0])
    generate, scorers = partial(family.generate, loaded), Scorers({"clip": BUILTIN})
    references = [open_rgb(sample.path) for sample in samples]
    return harness.compare_conditions(PromptGrid(cases, seeds, template), generate, name, scorers, references)


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
        return f"{self.evaluation.text()}\nScores and images are in {self.path}"


def check_gates(evaluation: Evaluation, path: Path, texts: Sequence[str]) -> GatedEvaluation:
    """Looks which conditions do not hold; `path` is the folder of the evaluation."""
    metrics, names = ([item.name for item in items] for items in (evaluation.metrics, evaluation.candidates))
    failed = gates.failures([gates.parse(text, metrics, names) for text in texts], evaluation)
    return GatedEvaluation(evaluation, path, tuple(failed))


def evaluate_as_table(model: str | Path | ModelOptions | None = None, **request: Any) -> pd.DataFrame:
    """Evaluates, and returns the lines of scores.csv as a table.

    Args:
        model: the base, by its path or as options; None takes that of `run`.
        request: fields of EvaluationRequest.
    """
    options = find_model(str(model)) if isinstance(model, str | Path) else model
    return evaluate(EvaluationRequest(model=options, **request)).table()


def _config_of(run: RunFolder | None, errors: Errors) -> Config | None:
    with errors.noted():
        return run.config() if run else None
    return None


def _info(family: Family, model: ModelOptions, size: tuple[int, int] | None, errors: Errors) -> BaseInfo:
    """Looks at the base; where there is an error, what is returned is never used."""
    info: Any = None
    with errors.noted():
        info = family.check(model)
    if info and size and (size[0] % info.size_step or size[1] % info.size_step):
        errors.append(f"--size {size[0]}x{size[1]}: both sides must be multiples of {info.size_step} for this base.")
    return info  # type: ignore[no-any-return]


def _entries(
    request: EvaluationRequest,
    run: RunFolder | None,
    config: Config | None,
    family: Family,
    model: ModelOptions,
    errors: Errors,
) -> list[Entry]:
    num_errors = len(errors)
    entries = _candidates.from_files(request.adapters, family, model, errors)
    if run and config:
        entries += _candidates.from_run(run, errors)
    if not entries and len(errors) == num_errors:
        errors.append("There is nothing to evaluate: give --adapter FILE or --run RUN_DIR.")
    return entries


def _weighted(entries: Sequence[Entry], weights: Sequence[float], errors: Errors) -> Candidates:
    """Returns each entry at each weight."""
    bad = [weight for weight in weights if not math.isfinite(weight)]
    if bad or not weights:
        errors.append(f"--weights {','.join(map(str, weights))}: must be numbers, say 0,0.5,1.")
        return {}
    candidates: dict[str, tuple[Entry, Candidate]] = {}
    for entry in entries:
        for weight in weights:
            candidate = entry.candidate(weight)
            if candidate.name in candidates:
                errors.append(f"{candidate.name} is there twice; give each adapter, and each weight, once.")
            candidates[candidate.name] = entry, candidate
    return candidates


def _cases(request: EvaluationRequest, recorded: Sequence[str], errors: Errors) -> Sequence[Case]:
    """Returns the cases; `recorded` are the triggers that the adapters' files name."""
    if not isinstance(request.prompts, str | Path):
        return request.prompts
    triggers = request.triggers or recorded
    is_plain = not any("+" in text for text in request.adapters)
    if len(triggers) > 1 and is_plain and not request.triggers:
        errors.append(f"The adapters have different triggers ({', '.join(triggers)}); give --trigger WORDS.")
    with errors.noted():
        # Where there are errors, that no adapter named its trigger may follow from them.
        cases = read_cases(request.prompts, triggers or (["trigger"] if errors else []), request.classes)
        errors += check_used(request.prompts, request.triggers, request.classes)
        return cases
    return ()


def _training_folder(request: EvaluationRequest, config: Config | None) -> Path | None:
    if request.training or not config:
        return request.training
    folder = user_path(config.data.path, "data.path")
    if folder.is_dir():
        return folder
    logger.warning("The training images of the run are not at %s any more; give --training DIR.", folder)
    return None


def _images(folder: Path | None, option: str, errors: Errors) -> list[FileHash]:
    """Returns the images of a folder and its subfolders, all of which can be read."""
    if folder is None:
        return []
    with errors.noted():
        return [FileHash(str(path), sha256(path)) for path in find_images(str(folder), option)]
    return []


def _captions(folder: Path | None, references: Sequence[FileHash], triggers: Sequence[str]) -> tuple[str, ...]:
    """Returns what the references show, as far as captions lie beside them."""
    if not folder or not references:
        return ()
    return read_captions(str(folder), [Path(file.path) for file in references], triggers, "--references")


def _concepts(
    request: EvaluationRequest,
    cases: Sequence[Case],
    candidates: Candidates,
    triggers: Sequence[str],
    errors: Errors,
) -> list[NamedConcept]:
    """Returns the concepts of a composition, with their references and the candidates that show each alone."""
    found = []
    for text in request.concepts:
        with errors.noted():
            concept = concepts.parse(text)
            references = _images(Path(concept.folder), "--concept", errors)
            captions = _captions(Path(concept.folder), references, [*triggers, concept.trigger])
            alone = [
                name
                for name, (entry, candidate) in candidates.items()
                if candidate.weight and [source.trigger for source, _ in entry.parts] == [concept.trigger]
            ]
            found.append(replace(concept, references=references, reference_captions=captions, alone=alone))
    errors += concepts.check(found, cases)
    return found


def _metrics(
    request: EvaluationRequest, cases: Sequence[Case], given: set[str], scorers: Scorers, errors: Errors
) -> list[Metric]:
    """Returns the metrics that were named, or all that can be computed, with their models loaded."""
    metrics = []
    left_out = []
    for name in dict.fromkeys(request.metrics or registry.available("metrics")):
        with errors.noted():
            metric: Metric = registry.find("metrics", name)
            lack = _lack(metric, request, cases, given, scorers)
            if lack and request.metrics:
                raise ConfigError(f"--metrics {name} {lack}.")
            left_out += [f"{name} ({lack})"] if lack and metric.outputs != "texts" else []
            metrics += [] if lack else [metric]
    if left_out:
        logger.info("Metrics that are left out: %s", ", ".join(left_out))
    for role in dict.fromkeys(role for metric in metrics for role in metric.scorers if role in LOADERS):
        with errors.noted():
            scorers.find(role)
    return metrics


def _lack(
    metric: Metric, request: EvaluationRequest, cases: Sequence[Case], given: set[str], scorers: Scorers
) -> str | None:
    """Says why a metric cannot be computed, or None."""
    if metric.outputs == "texts":
        return "scores texts, not images"
    missing = [_OPTIONS.get(name, name) for name in sorted(metric.needs - given)]
    missing += [f"--scorer {role}=NAME" for role in metric.scorers if role not in scorers.names]
    if missing:
        return f"needs {' and '.join(missing)}"
    if metric.per_prompt and len(request.seeds) < 2:
        return "needs two seeds or more"
    wants_control = metric.outputs == "control"
    if cases and not any(case.is_control == wants_control for case in cases):
        groups = " or ".join(sorted(CONTROL_GROUPS)) if wants_control else "subject, style, ..."
        return f"needs prompts of group {groups}"
    return None


def _unused_scorers(request: EvaluationRequest, metrics: Sequence[Metric]) -> list[str]:
    """Returns an error for each scoring model of the user that no metric asks for."""
    known: dict[str, list[str]] = defaultdict(list)
    for name in registry.available("metrics"):
        for role in registry.find("metrics", name).scorers:
            known[role].append(name)
    used = {role for metric in metrics for role in metric.scorers}
    errors = []
    for role, model in request.scorers.items():
        if role not in known:
            errors.append(
                f"--scorer {role}={model}: no metric asks for such a model; use one of {', '.join(sorted(known))}"
                f"{suggestion(role, list(known))}."
            )
        elif role not in used:
            option = f"--clip {model}" if role == "clip" else f"--scorer {role}={model}"
            errors.append(f"{option} does nothing: none of its metrics is computed ({', '.join(known[role])}).")
    return errors


def _guidance(request: EvaluationRequest, info: BaseInfo) -> float:
    return info.guidance if request.guidance is None else request.guidance


def _check_rest(request: EvaluationRequest, candidates: Candidates, metrics: Sequence[Metric], errors: Errors) -> None:
    if not request.seeds or len(set(request.seeds)) < len(request.seeds):
        errors.append(f"--seed {' '.join(map(str, request.seeds))}: give each seed once, and at least one.")
    errors += [
        f"--seed {seed}: must be 0 or greater, and less than 2^63." for seed in request.seeds if not 0 <= seed < 2**63
    ]
    if not 1 <= request.num_steps <= MAX_DENOISING_STEPS:
        errors.append(f"--steps {request.num_steps}: must be from 1 to {MAX_DENOISING_STEPS}.")
    if request.guidance is not None and not 1 <= request.guidance < math.inf:
        errors.append(f"--guidance {request.guidance:g}: must be 1 (off) or greater.")
    for text in request.gates:
        with errors.noted():
            gates.parse(text, [metric.name for metric in metrics], [BASE, *candidates])
    for folder, option in ((request.output_path, "--output"), (request.cache_path, "--cache")):
        with errors.noted():
            if folder is not None:
                check_writable(folder, option)
    others = [path.name for path in request.output_path.iterdir()] if request.output_path.is_dir() else []
    if others and not {"evaluation.json", harness.IMAGES, "machine.json"} & {*others}:
        errors.append(f"--output {request.output_path} holds other files; give a new folder, or one of an evaluation.")


def _warnings(
    references: Sequence[FileHash], training: Sequence[FileHash], scorers: Scorers, architecture: Architecture
) -> list[str]:
    caveats = []
    trained = {file.sha256 for file in training}
    shared = [Path(file.path).name for file in references if file.sha256 in trained]
    if shared:
        caveats.append(
            f"{len(shared)} of {len(references)} references are training images ({name_some(shared)}), so likeness "
            "to them rewards copying; give images that were not trained on."
        )
    if is_encoder_of_base(scorers.names["clip"], architecture):
        caveats.append(
            f"The base reads its prompts with the very CLIP that scores its images ({scorers.names['clip']}), so "
            "clip_text flatters it; give another --clip."
        )
    return caveats
