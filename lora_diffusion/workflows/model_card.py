"""The page that a model site shows beside an adapter: what it is, what it draws, how to load it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from lora_diffusion import __version__
from lora_diffusion.compat.inspect import describe_file
from lora_diffusion.compat.verify import CLIENTS
from lora_diffusion.core import registry
from lora_diffusion.core.errors import AdapterFileError, ConfigError, DataError, ModelError
from lora_diffusion.core.files import sha256
from lora_diffusion.core.privacy import public_path, public_text
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.text import shown
from lora_diffusion.evaluation import results
from lora_diffusion.evaluation.results import Evaluation
from lora_diffusion.formats.detect import detect
from lora_diffusion.formats.metadata import told_family, told_prediction
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows.merge import find_model

_MOST_PICTURES = 4
_LONGEST_NAME = 200
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MARKDOWN = re.compile(r"([\\`*_\[\]!#~|])")
"""Signs that make links, pictures, headings and the like of a text."""
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
_READS = {"comfyui": "kohya", "a1111": "kohya", "forge": "kohya", "kohya": "kohya"}
"""Client -> the spelling that it reads; diffusers reads its own and kohya's."""
_USUAL_SKIP = {"sd1": 1, "sd2": 1, "sdxl": 2}
"""Family -> layer of the text encoders that is read unless something else is asked, counted from the end."""
_WRITERS = {
    "llava": ("image-text-to-text", "AutoModelForImageTextToText"),
    "whisper": ("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
}
"""Families that write -> what the hub calls what they do, and the class of transformers that loads their bases."""


@dataclass(frozen=True)
class Package:
    """What belongs together on a model site."""

    files: Mapping[str, Path]
    """Name there -> file here; adapters first, then pictures."""
    adapters: Mapping[str, str]
    """Spelling -> name of the file or folder."""
    pictures: tuple[str, ...]
    metadata: Mapping[str, str]
    variant: str
    base: str
    """A hub id, or what else the base is called; of a folder or file of this machine only the name."""
    evaluation: Evaluation | None = None
    is_of_run: bool = False
    """It was trained with this program, as far as can be told."""

    @property
    def writer(self) -> tuple[str, str] | None:
        """What _WRITERS says of its family."""
        return _WRITERS.get(self.metadata.get("modelspec.architecture", "").split("/")[0])


def collect(source: Path) -> Package:
    """Gathers the adapters, pictures and scores of a run, or the one adapter file.

    Raises:
        InputError: it is neither, the run has not finished, or a file cannot be read.
    """
    if (checkpoint := _run_checkpoints.find(source)) is not None:
        raise ConfigError(
            f"{source} is a checkpoint, which no program reads; make a file of it with 'lora-diffusion export "
            f"{checkpoint.run_path} --step {checkpoint.step}'."
        )
    if not (source / "config.yaml").is_file():
        return _package({detect(source): source})
    run = RunFolder(source)
    config = run.config()
    run.find_adapter(config)
    paths = {name: run.adapter_path(config, name) for name in config.output.formats}
    adapters = {name: path for name, path in paths.items() if path.exists()}
    previews = sorted(run.previews_path.glob("step-*.png"))[-1:]
    return _package(adapters, [*sorted(source.glob("*.png")), *previews], config.model.path, _evaluation(source))


def collect_exported(path: Path, format_name: str, run: RunFolder) -> Package:
    """Gathers one exported file with what its run says of it; pictures stay in the run."""
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
    pictures: Sequence[Path] = (),
    base: str | None = None,
    evaluation: Evaluation | None = None,
) -> Package:
    report = describe_file(next(iter(adapters.values())))
    if not report.num_modules:
        raise AdapterFileError(f"{report.path} holds no adapter.")
    if report.faults:
        raise AdapterFileError(f"{report.path} is broken; get it again, or use an earlier checkpoint.", report.faults)
    shown_pictures = {picture.name: picture for picture in pictures[:_MOST_PICTURES]}
    contents = {name: path for adapter in adapters.values() for name, path in _contents(adapter).items()}
    return Package(
        files={**contents, **shown_pictures},
        adapters={spelling: path.name for spelling, path in adapters.items()},
        pictures=tuple(shown_pictures),
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
    found = sorted(run.rglob("evaluation.json"), key=lambda path: path.stat().st_mtime)
    try:
        return results.read(found[-1].parent) if found else None
    except DataError:
        return None


def _head(package: Package) -> dict[str, Any]:
    metadata = package.metadata
    trigger = metadata.get("modelspec.trigger_phrase")
    widget = [{"text": trigger or " ", "output": {"url": name}} for name in package.pictures]
    head = {
        "license": metadata.get("modelspec.license", "").lower() or None,
        "base_model": package.base if _HUB_ID.fullmatch(package.base) and not Path(package.base).exists() else None,
        "instance_prompt": trigger,
        "widget": widget or None,
    }
    kept = {key: value for key, value in head.items() if value}
    made_with = ["lora-diffusion"] * package.is_of_run
    if package.writer:
        task = package.writer[0]
        return {"library_name": "peft", "pipeline_tag": task, "tags": [task, "lora", *made_with], **kept}
    tags = ["text-to-image", "stable-diffusion", "lora", "template:sd-lora", *made_with]
    return {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags, **kept}


def _values(package: Package, repo: str) -> dict[str, Any]:
    metadata = {key: _code(shown(value, 1000)) for key, value in package.metadata.items()}
    # kohya writes None for what was not set.
    told = {label: metadata.get(key, "None") for label, key in _SETTINGS.items()}
    settings = {label: value.replace("|", "/") for label, value in told.items() if value != "None"}
    trigger = metadata.get("modelspec.trigger_phrase", "")
    clients, others = _clients(package)
    values = {
        "title": metadata.get("modelspec.title") or Path(next(iter(package.adapters.values()))).stem,
        "description": metadata.get("modelspec.description"),
        "variant": package.variant,
        "base": package.base,
        "version": __version__ if package.is_of_run else None,
        "pictures": package.pictures,
        "trigger": trigger,
        "trigger_code": _code(f" {trigger}" if trigger else ""),
        "model_class": package.writer and package.writer[1],
        "folder": package.adapters.get("peft"),
        "clients": clients,
        "others": others,
        "network_module": metadata.get("ss_network_module", "networks.lora"),
        "clip_skip": _unusual_skip(package),
        "usual_skip": _USUAL_SKIP.get(told_family(package.metadata) or ""),
        **_loading(package),
        "repo_code": _code(json.dumps(repo)),
        "prompt_code": _code(json.dumps(trigger or "a picture")),
        "settings": {label: public_text(public_path(value)) for label, value in settings.items()},
        "files": [_file(name, path) for name, path in package.files.items() if name not in package.pictures],
        "license": metadata.get("modelspec.license"),
    }
    return {**values, **_scores(package.evaluation)}


def _unusual_skip(package: Package) -> int | None:
    """Returns which layer of the text encoders it was trained with, None for the one that is read anyhow."""
    family, text = told_family(package.metadata), package.metadata.get("ss_clip_skip", "")
    # sd-scripts writes the option for other bases too, but trains them with their usual layer.
    is_meant = family == "sd1" or (family in _USUAL_SKIP and package.is_of_run)
    skip = int(text) if is_meant and re.fullmatch("[1-9][0-9]?", text) else None
    return None if skip == _USUAL_SKIP.get(family or "") else skip


def _layer(client: str, family: str, skip: int) -> int | None:
    """Returns how a program calls a layer of the text encoders, None if it cannot read this one.

    Sources: `encode_prompt` of diffusers 0.42; `set_clip_options` in comfy/sd1_clip.py of ComfyUI;
    modules/sd_hijack_clip.py of A1111; backend/text_processing/classic_engine.py of Forge; gen_img.py of sd-scripts.
    """
    if client == "diffusers":
        return skip - _USUAL_SKIP[family]
    if client == "comfyui":
        # The text encoder of SD 2 comes to diffusers, and to us, without its last layer.
        return -skip - (family == "sd2")
    can_read = {"a1111": family == "sd1", "forge": family != "sdxl" or skip > 1, "kohya": family != "sd2"}
    return skip if can_read[client] else None


def _loading(package: Package) -> dict[str, str | bool]:
    """Returns what the code that loads the base is made of, and whether its prediction must be told."""
    builtin = _builtin_folder(package.base)
    base = f'builtin_path("{builtin}")' if builtin else _code(json.dumps(package.base))
    metadata, family = package.metadata, told_family(package.metadata)
    is_velocity = _predicts_velocity(metadata)
    values: dict[str, str | bool] = {
        "base_code": base,
        "base_import": _IMPORT_BUILTIN if builtin else "",
        # A base of SD 2 may predict either, and programs tell.
        "is_unusual": is_velocity and family != "sd2",
    }
    if not package.base.endswith(".safetensors"):
        return {**values, "pipeline": "AutoPipelineForText2Image", "loader": "from_pretrained"}
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    # A single file holds no scheduler, and diffusers can but guess.
    scheduler = ['prediction_type="v_prediction"' if is_velocity else 'prediction_type="epsilon"']
    if metadata.get("ss_zero_terminal_snr") == "True":
        scheduler += ["rescale_betas_zero_snr=True", 'timestep_spacing="trailing"']
    told = ", ".join(scheduler) if is_velocity or family == "sd2" else ""
    return {**values, "pipeline": pipeline, "loader": "from_single_file", "scheduler": told}


def _predicts_velocity(metadata: Mapping[str, str]) -> bool:
    words = {metadata.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key")}
    return bool(words & {"v", "v_prediction"}) or told_prediction(metadata) == "v_prediction"


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


def _clients(package: Package) -> tuple[list[dict[str, str | int | None]], list[str]]:
    """Returns the clients that can apply it, each with its file, and the titles of those that cannot apply its kind."""
    able, others = [], []
    skip, family = _unusual_skip(package), told_family(package.metadata) or ""
    for client in CLIENTS.values():
        file = package.adapters.get(_READS.get(client.name, "diffusers")) or package.adapters.get("kohya")
        reads_kind = {*package.variant.split(" and ")} <= {
            *client.variants,
            *([] if client.dora == "ignored" else ["dora"]),
        }
        if not reads_kind:
            others.append(client.title)
        elif file and (client.name == "diffusers" or "kohya" in package.adapters):
            layer = _layer(client.name, family, skip) if skip else None
            able.append({"name": client.name, "title": client.title, "file": _code(file), "layer": layer})
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
