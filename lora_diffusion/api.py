"""What `import lora_diffusion as ld` offers, with plain arguments: paths as texts, configs by name or as mappings.

Each function calls the workflow of the command of that name and returns its result, which has `to_json()` and `text()`.
What a user can cause raises a `LoraDiffusionError`, as on the command line. Workflows are imported when called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.errors import LoraDiffusionError as LoraDiffusionError

if TYPE_CHECKING:
    import pandas

    from lora_diffusion.compat.inspect import FileReport
    from lora_diffusion.config.schema import Config, ModelOptions
    from lora_diffusion.evaluation.results import Case
    from lora_diffusion.workflows.ask import ImageAnswers
    from lora_diffusion.workflows.compose import Composition
    from lora_diffusion.workflows.convert import Conversion
    from lora_diffusion.workflows.estimate import Estimate
    from lora_diffusion.workflows.export import Export
    from lora_diffusion.workflows.extract import ExtractResult
    from lora_diffusion.workflows.generate import GeneratedImages
    from lora_diffusion.workflows.load import Model
    from lora_diffusion.workflows.merge import MergeResult
    from lora_diffusion.workflows.report import Report
    from lora_diffusion.workflows.select import Selection
    from lora_diffusion.workflows.train import TrainResult
    from lora_diffusion.workflows.transcribe import Transcripts
    from lora_diffusion.workflows.verify import Verification

AnyPath = str | Path
Adapters = Mapping[str, float] | Mapping[Path, float] | Sequence[AnyPath]
"""Files with their weights, or without."""
Weight = float | Mapping[str, float]
"""Of a whole adapter, or part -> weight."""
WeightedParts = Mapping[str, Weight] | Mapping[Path, Weight] | Sequence[tuple[AnyPath, Weight]]
"""Files with their weights."""


def load_config(
    config: AnyPath | Mapping[str, Any] | Config | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    required: bool = True,
    unused: Sequence[str] = (),
) -> Config:
    """Returns a config, all of which has been checked.

    Args:
        config: YAML file, name of a shipped config such as sd1/style, or section -> key -> value; None takes the
            defaults.
        overrides: "section.key" -> value, or texts "section.key=value" as on the command line; they win.
        required: refuse a config that lacks a value which has no default.
        unused: "section.key" of those that may lack all the same.

    Raises:
        ConfigError: lists every unknown key, wrong type, missing value and broken rule.
    """
    from lora_diffusion.config.load import load
    from lora_diffusion.config.schema import Config

    if isinstance(config, Config):
        if overrides:
            raise TypeError("Overrides go with a file, a name or a mapping; a loaded config is taken as it is.")
        return config
    texts = _texts(overrides) if isinstance(overrides, Mapping) else list(overrides)
    if config is None or isinstance(config, Mapping):
        settings = {
            f"{section}.{key}": value for section, keys in (config or {}).items() for key, value in keys.items()
        }
        return load(None, [*_texts(settings), *texts], required=required, unused=unused)
    return load(Path(config), texts, required=required, unused=unused)


def train(
    config: AnyPath | Mapping[str, Any] | Config | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Trains an adapter; see `load_config` for the config.

    Args:
        config: what is trained on what.
        overrides: "section.key" -> value.
        resume: continue the run in output.path where it stopped.
        overwrite: replace the run in output.path.
    """
    from lora_diffusion.workflows.train import train

    return train(load_config(config, overrides), resume=resume, overwrite=overwrite)


def estimate(
    config: AnyPath | Mapping[str, Any] | Config | None = None, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Estimate:
    """Predicts how much memory a training run needs, from shapes alone; see `load_config` for the config."""
    from lora_diffusion.workflows.estimate import estimate

    return estimate(load_config(config, overrides, unused=("data.path", "output.path")))


def load(
    base: AnyPath | ModelOptions,
    adapters: Mapping[str, AnyPath | tuple[AnyPath, float]] | None = None,
    *,
    family: str | None = None,
) -> Model:
    """Loads a base once, for many calls of `generate` and of `Model.generate` at any weights of its adapters.

    Args:
        base: builtin:emoji, a folder, a .safetensors checkpoint or a hub id; or the `model` section of a config.
        adapters: name -> file, folder saved by PEFT or checkpoint of a run; with a weight where it is not 1.
        family: that of the base; None finds it from the files.
    """
    from lora_diffusion.workflows.load import load

    named = {name: one if isinstance(one, tuple) else (one, 1.0) for name, one in (adapters or {}).items()}
    return load(_base(base, family), {name: (Path(path), weight) for name, (path, weight) in named.items()})


def generate(
    base: AnyPath | ModelOptions | Model,
    prompts: str | Sequence[str],
    output: AnyPath,
    *,
    adapters: Adapters = (),
    seeds: int | Sequence[int] = 0,
    negative: str = "",
    num_steps: int = 25,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
) -> GeneratedImages:
    """Generates each prompt with each seed into a folder, and a grid of all.

    Args:
        base: as `load` takes it, or what it returned.
        prompts: one or more.
        output: folder; images of the same name are replaced.
        adapters: files with their weights, or without; all are applied at once.
        seeds: one or more.
        negative: what the images should not show.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; 1 turns it off, None takes what suits the base.
        size: width and height in pixels; None takes what the base was trained on.
    """
    from lora_diffusion.workflows.generate import generate

    return generate(
        _model(base),
        prompts=_list(prompts),
        output_path=Path(output),
        seeds=[seeds] if isinstance(seeds, int) else seeds,
        adapters=_weighted(adapters),
        negative=negative,
        num_steps=num_steps,
        guidance=guidance,
        size=size,
    )


def transcribe(
    paths: AnyPath | Sequence[AnyPath],
    base: AnyPath | ModelOptions | Model = "builtin:digits",
    *,
    adapters: Adapters = (),
) -> Transcripts:
    """Writes down what recordings say.

    Args:
        paths: recordings, and folders of them.
        base: of Whisper, as `load` takes it, or what it returned.
        adapters: files with their weights, or without; all are applied at once.
    """
    from lora_diffusion.workflows.transcribe import transcribe

    return transcribe(_model(base, "whisper"), _paths(paths), _weighted(adapters))


def ask(
    paths: AnyPath | Sequence[AnyPath],
    question: str,
    base: AnyPath | ModelOptions | Model = "builtin:emoji-llava",
    *,
    adapters: Adapters = (),
) -> ImageAnswers:
    """Asks the same about each image.

    Args:
        paths: images, and folders of them.
        question: the same for each image.
        base: of LLaVA, as `load` takes it, or what it returned.
        adapters: files with their weights, or without; all are applied at once.
    """
    from lora_diffusion.workflows.ask import ask

    return ask(_model(base, "llava"), _paths(paths), question, _weighted(adapters))


def evaluate(
    base: AnyPath | ModelOptions | None = None,
    *,
    prompts: AnyPath | Sequence[Case],
    output_path: AnyPath,
    adapters: AnyPath | Sequence[AnyPath] = (),
    run: AnyPath | None = None,
    weights: Sequence[float] = (1.0,),
    references: AnyPath | None = None,
    concepts: Sequence[str] = (),
    training: AnyPath | None = None,
    metrics: Sequence[str] = (),
    scorers: Mapping[str, AnyPath] | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3),
    triggers: Sequence[str] = (),
    classes: Sequence[str] = (),
    num_steps: int = 25,
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    negative: str = "",
    cache_path: AnyPath | None = None,
) -> pandas.DataFrame:
    """Scores adapters, checkpoints and weights against the base alone, and returns the scores as a table.

    Args:
        base: as `load` takes it; None takes that of `run`.
        prompts: YAML file, name of a shipped suite such as emoji-style, or cases.
        output_path: folder of the result; images in it are used again.
        adapters: files; "A:0.8+B:0.6" are used together.
        run: folder of a run, whose checkpoints are compared.
        weights: all weights are multiplied with each of these.
        references: folder of real images that were not trained on.
        concepts: "style:TRIGGER=DIR" or "subject:TRIGGER=DIR" of each adapter of a composition, with its references.
        training: folder of the training images, to find copies.
        metrics: without any, all that can be computed from what is given.
        scorers: "clip", "dino", ... -> model that scores.
        seeds: each prompt is generated once with each seed.
        triggers: words for {trigger}, {trigger2}, ... of the prompts.
        classes: words for {class}, {class2}, ... of the prompts.
        num_steps: denoising steps.
        guidance: classifier-free guidance scale; None takes what suits the base.
        size: width and height in pixels; None takes what the base was trained on.
        negative: what the images should not show.
        cache_path: folder of images that evaluations share.

    Returns:
        One line for each score, with the columns of scores.csv: candidate, metric, value, ...
    """
    given = {name: value for name, value in locals().items() if name != "base"}
    from lora_diffusion.workflows.evaluate import evaluate_as_table

    return evaluate_as_table(base, **{**given, "scorers": scorers or {}})


def select(run: AnyPath, evaluation: AnyPath | None = None, overrides: Mapping[str, Any] | None = None) -> Selection:
    """Chooses the best checkpoint and weight of a finished run, and writes best.safetensors.

    Args:
        run: its folder.
        evaluation: folder of an evaluation of its checkpoints; None makes one, as the run's `evaluate` section says.
        overrides: "evaluate.key" -> value for that.
    """
    from lora_diffusion.workflows.select import select

    return select(Path(run), None if evaluation is None else Path(evaluation), None, _texts(overrides or {}))


def report(paths: AnyPath | Sequence[AnyPath], output: AnyPath | None = None) -> Report:
    """Writes a page about one run or evaluation, or one that compares several.

    Args:
        paths: run folders, evaluation folders, or both.
        output: the HTML file; None takes report.html in the folder, or comparison.html where there are several.
    """
    from lora_diffusion.workflows.report import report

    return report(_paths(paths), None if output is None else Path(output))


def export(
    run: AnyPath,
    to: str,
    output: AnyPath,
    *,
    step: int | None = None,
    apps: Sequence[str] = (),
    card: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes the adapter of a run in a format.

    Args:
        run: folder of a run, or a checkpoint in it.
        to: kohya, diffusers, peft or another format.
        output: file, or folder where the format is one.
        step: the checkpoint after this step instead of the finished adapter.
        apps: must apply all of it; without any, those that the format is meant for.
        card: write a model card, README.md, beside it.
        overwrite: replace what is there.
    """
    from lora_diffusion.workflows.export import export

    return export(Path(run), to, Path(output), step=step, apps=apps, card=card, overwrite=overwrite)


def convert(
    input: AnyPath,  # noqa: A002 - what the command calls it
    output: AnyPath,
    to: str,
    *,
    dtype: str = "auto",
    family: str | None = None,
    base: str | None = None,
    from_pickle: bool = False,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Conversion:
    """Writes an adapter file in another format, with the same tensors, alphas and metadata.

    Args:
        input: adapter file, folder saved by PEFT, or checkpoint of a run.
        output: file, or folder where the format is one.
        to: format, or an app that reads it.
        dtype: fp32, fp16 or bf16; auto keeps that of the input.
        family: that of the base; None takes the one that the tensors match.
        base: the base itself, if it is built unlike the published ones.
        from_pickle: take the tensors out of a pickle, without running what is in it.
        embeddings: keep or drop text embeddings that are packed into the file.
        overwrite: replace what is there.
    """
    from lora_diffusion.workflows.convert import convert

    return convert(
        Path(input),
        Path(output),
        to,
        dtype=dtype,
        model_path=base,
        family_name=family,
        is_pickle=from_pickle,
        embeddings=embeddings,
        overwrite=overwrite,
    )


def inspect(path: AnyPath) -> FileReport:
    """Says what an adapter file, or a checkpoint of a run, is and what is wrong with it; needs no base."""
    from lora_diffusion.workflows.inspect import inspect

    return inspect(Path(path))


def verify(path: AnyPath, apps: Sequence[str] = (), base: str | None = None) -> Verification:
    """Says what other programs would ignore, misread or hide of an adapter file.

    Args:
        path: adapter file, folder saved by PEFT, or checkpoint of a run.
        apps: comfyui, a1111, forge, kohya or diffusers; without any, all.
        base: sd1, sd2, sdxl or a base; None finds it from the file.
    """
    from lora_diffusion.workflows.verify import verify

    return verify(Path(path), apps, base)


def compose(
    adapters: WeightedParts,
    output: AnyPath,
    *,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "auto",
    base: str | None = None,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Composition:
    """Writes several adapter files as one, by default their weighted sum.

    Args:
        adapters: files with their weights.
        output: file, or folder where the format is one.
        method: name of a merge method.
        rank: of each module; without it and `energy` the sum is exact, and ranks add up.
        energy: share of each module's squared norm to keep; given instead of a rank.
        dtype: fp32, fp16 or bf16; auto keeps that of the adapters.
        base: the base itself, if it is built unlike the published ones.
        embeddings: keep or drop text embeddings that are packed into the files.
        overwrite: replace what is there.
    """
    from lora_diffusion.workflows.compose import compose

    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
    return compose(
        [(Path(path), weight) for path, weight in pairs],
        Path(output),
        method=method,
        rank=rank,
        energy=energy,
        dtype=dtype,
        model_path=base,
        embeddings=embeddings,
        overwrite=overwrite,
    )


def resize(
    input: AnyPath,  # noqa: A002 - what the command calls it
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "auto",
    base: str | None = None,
    embeddings: str = "keep",
    overwrite: bool = False,
) -> Composition:
    """Writes an adapter file at a smaller rank; either `rank` or `energy` must be given, see `compose`."""
    from lora_diffusion.workflows.resize import resize

    return resize(
        Path(input),
        Path(output),
        rank=rank,
        energy=energy,
        dtype=dtype,
        model_path=base,
        embeddings=embeddings,
        overwrite=overwrite,
    )


def merge(
    base: AnyPath,
    adapters: WeightedParts,
    output: AnyPath,
    *,
    dtype: str = "auto",
    family: str | None = None,
    overwrite: bool = False,
) -> MergeResult:
    """Writes a base with adapters in it.

    Args:
        base: builtin:emoji, a folder, a .safetensors checkpoint or a hub id.
        adapters: files with their weights.
        output: folder, or file where the base is one.
        dtype: fp32, fp16 or bf16 of the networks; auto keeps that of each tensor.
        family: that of the base; None finds it from the files.
        overwrite: replace what is there.
    """
    from lora_diffusion.workflows.bases import find_weights
    from lora_diffusion.workflows.merge import merge

    pairs = adapters.items() if isinstance(adapters, Mapping) else adapters
    weighted = [(Path(path), weight) for path, weight in pairs]
    return merge(find_weights(str(base), family), weighted, Path(output), dtype=dtype, overwrite=overwrite)


def extract(
    base: AnyPath,
    tuned: AnyPath,
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parts: Sequence[str] = (),
    targets: Sequence[str] = (),
    to: str = "kohya",
    dtype: str = "fp16",
    family: str | None = None,
    overwrite: bool = False,
) -> ExtractResult:
    """Writes the difference of two bases as an adapter; either `rank` or `energy` must be given, see `compose`.

    Args:
        base: model that the adapter is for.
        tuned: fine-tuned model of the same family.
        output: file, or folder where the format is one.
        rank: of each module.
        energy: share of each module's squared norm to keep.
        parts: networks to look at; without any, all.
        targets: modules, as `adapter.targets`; without any, all groups.
        to: format.
        dtype: fp32, fp16 or bf16.
        family: that of the base; None finds it from the files.
        overwrite: replace what is there.
    """
    from lora_diffusion.workflows.bases import find_weights
    from lora_diffusion.workflows.extract import extract

    return extract(
        find_weights(str(base), family),
        find_weights(str(tuned), family),
        Path(output),
        rank=rank,
        energy=energy,
        parts=parts,
        targets=targets,
        format_name=to,
        dtype=dtype,
        overwrite=overwrite,
    )


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Returns overrides as the command line writes them: a text as it stands, all else as JSON, which is YAML."""
    as_text = {
        key: str(value) if isinstance(value, str | Path) else json.dumps(value) for key, value in settings.items()
    }
    return [f"{key}={text}" for key, text in as_text.items()]


def _base(base: AnyPath | ModelOptions, family: str | None = None) -> ModelOptions:
    from lora_diffusion.workflows.bases import find_model

    return find_model(str(base), family) if isinstance(base, str | Path) else base


def _model(base: AnyPath | ModelOptions | Model, family: str | None = None) -> ModelOptions | Model:
    from lora_diffusion.workflows.load import Model

    return base if isinstance(base, Model) else _base(base, family)


def _weighted(adapters: Adapters) -> list[tuple[Path, float]]:
    if isinstance(adapters, Mapping):
        return [(Path(path), weight) for path, weight in adapters.items()]
    return [(Path(path), 1.0) for path in adapters]


def _list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _paths(paths: AnyPath | Sequence[AnyPath]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
