"""The page that a model site shows beside an adapter: what it is, what it generates, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from lora_diffusion.architectures import find_modelspec
from lora_diffusion.architectures.base import DiffusionArchitecture, TextOutputArchitecture
from lora_diffusion.compat.app_rules import APPS
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError, ConfigError, DataError, ModelError
from lora_diffusion.core.files import sha256
from lora_diffusion.core.privacy import public_path, public_text
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.text import shown
from lora_diffusion.core.version import __version__
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Evaluation
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.metadata import base_of, prediction_of
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import open_adapter
from lora_diffusion.workflows.bases import find_model

_MOST_IMAGES = 4
_LONGEST_NAME = 200
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MARKDOWN = re.compile(r"([\\`*_\[\]!#~|])")
"""Signs that make links, images, headings and the like of a text."""
_SETTINGS = {
    "base": "ss_sd_model_name",
    "trained parts and modules": "ss_network_args",
    "rank": "ss_network_dim",
    "alpha": "ss_network_alpha",
    "samples per epoch": "ss_num_train_images",
    "size": "modelspec.resolution",
    "clip skip": "ss_clip_skip",
    "prediction": "modelspec.prediction_type",
    "steps": "ss_steps",
    "batch size": "ss_total_batch_size",
    "learning rate": "ss_learning_rate",
    "learning rate of text encoders": "ss_text_encoder_lr",
    "schedule": "ss_lr_scheduler",
    "optimizer": "ss_optimizer",
    "seed": "ss_seed",
}
"""Label -> metadata that tells it."""
_IMPORT_BUILTIN = "from lora_diffusion.core.files import builtin_path"


@dataclass(frozen=True)
class Package:
    """What belongs together on a model site."""

    files: Mapping[str, Path]
    """Name there -> file here; adapters first, then images."""
    adapters: Mapping[str, str]
    """Format -> name of the file or folder."""
    images: tuple[str, ...]
    metadata: Mapping[str, str]
    variant: str
    base: str
    """A hub id, or what else the base is called; of a folder or file of this machine only the name."""
    evaluation: Evaluation | None = None
    is_of_run: bool = False
    """It was trained with this program, as far as can be told."""

    @property
    def text_output(self) -> TextOutputArchitecture | None:
        """That of its base, if it answers in text."""
        own = find_modelspec(self.metadata.get("modelspec.architecture", ""))
        return own if isinstance(own, TextOutputArchitecture) else None

    @property
    def diffusion(self) -> DiffusionArchitecture | None:
        """That of its base, if it makes images and the metadata tell it."""
        own = base_of(self.metadata)
        return own if isinstance(own, DiffusionArchitecture) else None


def collect(source: Path) -> Package:
    """Gathers the adapters, images and scores of a run, or the one adapter file.

    Raises:
        InputError: it is neither, the run has not finished, or a file cannot be read.
    """
    if (checkpoint := _run_checkpoints.find(source)) is not None:
        raise ConfigError(
            f"{source} is a checkpoint, which no program reads; make a file of it with 'lora-diffusion export "
            f"{checkpoint.run_path} --step {checkpoint.step}'."
        )
    if not (source / "config.yaml").is_file():
        return _package({detect(open_adapter(source)): source})
    run = RunFolder(source)
    config = run.config()
    run.find_adapter(config)
    paths = {name: run.adapter_path(config, name) for name in config.output.formats}
    adapters = {name: path for name, path in paths.items() if path.exists()}
    previews = sorted(run.previews_path.glob("step-*.png"))[-1:]
    return _package(adapters, [*sorted(source.glob("*.png")), *previews], config.model.path, _evaluation(source))


def collect_exported(path: Path, format_name: str, run: RunFolder) -> Package:
    """Gathers one exported file with what its run says of it; images stay in the run."""
    return _package({format_name: path}, (), run.config().model.path, _evaluation(run.path))


def write(package: Package, repo: str) -> str:
    """Returns the page as Markdown with a head in YAML; texts from metadata are made harmless.

    Args:
        package: what it is about.
        repo: USER/NAME on the hub, or a folder, from which diffusers loads; it is published.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"stem": lambda name: Path(name).stem, "plain": _plain}
    template = environment.from_string(resources(__package__).joinpath("model_card.md.j2").read_text("utf-8"))
    body = template.render(_values(package, repo))
    head = ModelCardData(**_head(package)).to_yaml()
    return f"---\n{head}\n---\n\n{body.strip()}\n"


def _package(
    adapters: Mapping[str, Path],
    images: Sequence[Path] = (),
    base: str | None = None,
    evaluation: Evaluation | None = None,
) -> Package:
    report = describe_file(parse_file(next(iter(adapters.values()))))
    if not report.num_modules:
        raise AdapterFileError(f"{report.path} holds no adapter.")
    if report.errors:
        raise AdapterFileError(f"{report.path} is broken; get it again, or use an earlier checkpoint.", report.errors)
    shown_images = {image.name: image for image in images[:_MOST_IMAGES]}
    contents = {name: path for adapter in adapters.values() for name, path in _contents(adapter).items()}
    return Package(
        files={**contents, **shown_images},
        adapters={format_name: path.name for format_name, path in adapters.items()},
        images=tuple(shown_images),
        metadata=report.metadata,
        variant=report.variant,
        base=_base_name(base or report.metadata.get("ss_sd_model_name", "an unknown base")),
        evaluation=evaluation,
        is_of_run=base is not None,
    )


def _base_name(text: str) -> str:
    """Returns how the base is called, in one line and without the folders in which it lies here."""
    return shown(public_path(text), _LONGEST_NAME)


def _contents(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.name: path}
    return {str(file.relative_to(path.parent)): file for file in sorted(path.rglob("*")) if file.is_file()}


def _evaluation(run: Path) -> Evaluation | None:
    """Returns the evaluation in a run, the newest if there are several."""
    paths = sorted(run.rglob("evaluation.json"), key=lambda path: path.stat().st_mtime)
    try:
        return results.read(paths[-1].parent) if paths else None
    except DataError:
        return None


def _head(package: Package) -> dict[str, Any]:
    metadata = package.metadata
    trigger = metadata.get("modelspec.trigger_phrase")
    widget = [{"text": trigger or " ", "output": {"url": name}} for name in package.images]
    head = {
        "license": metadata.get("modelspec.license", "").lower() or None,
        "base_model": package.base if _HUB_ID.fullmatch(package.base) and not Path(package.base).exists() else None,
        "instance_prompt": trigger,
        "widget": widget or None,
    }
    kept = {key: value for key, value in head.items() if value}
    made_with = ["lora-diffusion"] * package.is_of_run
    if package.text_output:
        task = package.text_output.task
        return {"library_name": "peft", "pipeline_tag": task, "tags": [task, "lora", *made_with], **kept}
    tags = ["text-to-image", "stable-diffusion", "lora", "template:sd-lora", *made_with]
    return {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags, **kept}


def _values(package: Package, repo: str) -> dict[str, Any]:
    metadata = {key: _code(shown(value, 1000)) for key, value in package.metadata.items()}
    # kohya writes None for what was not set.
    texts = {label: metadata.get(key, "None") for label, key in _SETTINGS.items()}
    settings = {label: value.replace("|", "/") for label, value in texts.items() if value != "None"}
    trigger = metadata.get("modelspec.trigger_phrase", "")
    apps, others = _apps(package)
    values = {
        "title": metadata.get("modelspec.title") or Path(next(iter(package.adapters.values()))).stem,
        "description": metadata.get("modelspec.description"),
        "variant": package.variant,
        "base": package.base,
        "version": __version__ if package.is_of_run else None,
        "images": package.images,
        "trigger": trigger,
        "trigger_code": _code(f" {trigger}" if trigger else ""),
        "model_class": package.text_output and package.text_output.auto_class,
        "folder": package.adapters.get("peft"),
        "apps": apps,
        "others": others,
        "network_module": metadata.get("ss_network_module", "networks.lora"),
        "clip_skip": _unusual_skip(package),
        "usual_skip": package.diffusion and package.diffusion.usual_clip_skip,
        **_loading(package),
        "repo_code": _code(json.dumps(repo)),
        "prompt_code": _code(json.dumps(trigger or "a picture")),
        "settings": {label: public_text(public_path(value)) for label, value in settings.items()},
        "files": [_file(name, path) for name, path in package.files.items() if name not in package.images],
        "license": metadata.get("modelspec.license"),
    }
    return {**values, **_scores(package.evaluation)}


def _unusual_skip(package: Package) -> int | None:
    """Returns which layer of the text encoders it was trained with, None for the one that is read anyhow."""
    architecture, text = package.diffusion, package.metadata.get("ss_clip_skip", "")
    # sd-scripts writes the option for other bases too, but trains them with their usual layer.
    is_meant = architecture and (architecture.is_clip_skip_kohyas or package.is_of_run)
    skip = int(text) if is_meant and re.fullmatch("[1-9][0-9]?", text) else None
    return None if architecture is None or skip == architecture.usual_clip_skip else skip


def _layer(app: str, architecture: DiffusionArchitecture, skip: int) -> int | None:
    """Returns how a program calls a layer of the text encoders, None if it cannot read this one.

    Sources: `encode_prompt` of diffusers 0.42; `set_clip_options` in comfy/sd1_clip.py of ComfyUI;
    modules/sd_hijack_clip.py of A1111; backend/text_processing/classic_engine.py of Forge; gen_img.py of sd-scripts.
    """
    if app == "diffusers":
        return skip - architecture.usual_clip_skip
    if app == "comfyui":
        return -skip - architecture.text_encoders[0].num_dropped_layers
    least = architecture.clip_skip_apps.get(app)
    return skip if least is not None and skip >= least else None


def _loading(package: Package) -> dict[str, str | bool]:
    """Returns what the code that loads the base is made of, and whether its prediction must be told."""
    builtin = _builtin_folder(package.base)
    base = f'builtin_path("{builtin}")' if builtin else _code(json.dumps(package.base))
    metadata, architecture = package.metadata, package.diffusion
    # Where bases of one architecture predict either, programs tell.
    is_told = architecture is not None and architecture.is_distinguished_by_prediction
    is_velocity = _predicts_velocity(metadata)
    values: dict[str, str | bool] = {
        "base_code": base,
        "base_import": _IMPORT_BUILTIN if builtin else "",
        "is_unusual": is_velocity and not is_told,
    }
    if not package.base.endswith(".safetensors"):
        return {**values, "pipeline": "AutoPipelineForText2Image", "loader": "from_pretrained"}
    pipeline = architecture.pipeline if architecture else DiffusionArchitecture.pipeline
    # A single file holds no scheduler, and diffusers can but guess.
    scheduler = ['prediction_type="v_prediction"' if is_velocity else 'prediction_type="epsilon"']
    if metadata.get("ss_zero_terminal_snr") == "True":
        scheduler += ["rescale_betas_zero_snr=True", 'timestep_spacing="trailing"']
    settings = ", ".join(scheduler) if is_velocity or is_told else ""
    return {**values, "pipeline": pipeline, "loader": "from_single_file", "scheduler": settings}


def _predicts_velocity(metadata: Mapping[str, str]) -> bool:
    words = {metadata.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key")}
    return bool(words & {"v", "v_prediction"}) or prediction_of(metadata) == "v_prediction"


def _builtin_folder(base: str) -> str | None:
    """Returns the folder of a built-in base; None for others, and for names that a stranger's file made up."""
    if not base.startswith("builtin:"):
        return None
    try:
        model = find_model(base)
    except ModelError:
        return None
    family: Family = registry.find("families", model.family)
    return str(family.check(model).path.name)


def _plain(text: Any) -> str:
    """Returns a text that Markdown shows as it stands; what is HTML in it, the template makes harmless."""
    return _MARKDOWN.sub(r"\\\1", str(text)).replace("://", ":\\//")


def _code(text: str) -> str:
    """Returns a text that cannot end the code that it stands in."""
    return text.replace("`", "'").replace("\n", " ")


def _file(name: str, path: Path) -> dict[str, Any]:
    return {"name": name, "num_bytes": f"{path.stat().st_size:,}", "sha256": sha256(path)}


def _apps(package: Package) -> tuple[list[dict[str, str | int | None]], list[str]]:
    """Returns the apps that can apply it, each with its file, and the titles of those that cannot apply its variant."""
    able, others = [], []
    skip, architecture = _unusual_skip(package), package.diffusion
    for app in APPS.values():
        file = package.adapters.get(app.format) or package.adapters.get("kohya")
        variants = {*app.variants, *([] if app.dora == "ignored" else ["dora"])}
        if not {*package.variant.split(" and ")} <= variants:
            others.append(app.title)
        elif file and (app.name == "diffusers" or "kohya" in package.adapters):
            layer = _layer(app.name, architecture, skip) if skip and architecture else None
            able.append({"name": app.name, "title": app.title, "file": _code(file), "layer": layer})
    return able, others


def _scores(evaluation: Evaluation | None) -> dict[str, Any]:
    if evaluation is None:
        return {"scores": {}}
    metrics = [metric.name for metric in evaluation.metrics]
    rows = {
        public_text(candidate.name): [_interval(evaluation, candidate.name, metric) for metric in metrics]
        for candidate in evaluation.candidates
    }
    return {
        "scores": rows,
        "metrics": metrics,
        "num_prompts": len(evaluation.cases),
        "scorers": ", ".join(map(public_path, evaluation.scorer.values())) or "no model",
    }


def _interval(evaluation: Evaluation, candidate: str, metric: str) -> str:
    try:
        return evaluation.find(candidate, metric).format(".3f")
    except KeyError:
        return ""
