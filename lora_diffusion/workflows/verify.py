"""What apps would make of adapter files; none of it loads a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.base import DiffusionArchitecture
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat.app_rules import HIDDEN
from lora_diffusion.compat.identify import guess_family
from lora_diffusion.compat.matched_file import Base, match_file
from lora_diffusion.compat.simulation import AppResult
from lora_diffusion.compat.verify import check_fit, default_apps
from lora_diffusion.compat.verify import verify as simulate_apps
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.errors import VerificationError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.formats.parsed_file import parse_file
from lora_diffusion.workflows import _run_checkpoints
from lora_diffusion.workflows._adapter_files import open_adapter
from lora_diffusion.workflows.bases import find_model

_FORMATS = ("kohya", "diffusers", "peft", "norms")


@dataclass(frozen=True)
class Verification:
    """The results of `verify`."""

    path: Path
    base: str
    results: tuple[AppResult, ...]

    @property
    def is_sound(self) -> bool:
        """Says whether every app applies all of it as we would."""
        return all(result.is_sound for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "file": str(self.path),
            "base": self.base,
            "sound": self.is_sound,
            "clients": [result.to_json() for result in self.results],
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"{self.path} on {self.base}", *(line for result in self.results for line in result.lines())]
        return "\n".join(lines)


def verify(path: Path, app_names: Sequence[str] = (), base: str | None = None) -> Verification:
    """Says what apps would ignore, misread or hide of an adapter file.

    Args:
        path: file, PEFT folder, or checkpoint of a run, which is looked at as the file that it would become.
        app_names: all known apps without any.
        base: a published diffusion base, or what `model.path` takes; without it, the one that the content is made for.

    Raises:
        AdapterFileError: the file cannot be read, or does not tell its base.
        ConfigError: there is no such app.
        ModelError: the base cannot be used.
        UnsupportedError: the file is for a base that is not known here.
    """
    with _run_checkpoints.as_file(path) as inside:
        file = open_adapter(inside)
        name = base or guess_family(file)
        matched = match_file(file, published_base(name) if name in DIFFUSION else _named(name))
        if base is None:
            check_fit(matched)
        return Verification(path, name, tuple(simulate_apps(matched, app_names)))


def app_errors(
    path: Path, format_name: str, family: Family, model: ModelOptions, app_names: Sequence[str]
) -> list[str]:
    """Returns what the apps of a written file would lose or misread, one line for each error.

    Args:
        path: the file or folder.
        format_name: that of the file.
        family: of the base. For one that apps do not know, nothing is looked for.
        model: the base.
        app_names: without any, those that the format is meant for and that read its variant.
    """
    architecture = family.architecture
    if not isinstance(architecture, DiffusionArchitecture) or not architecture.app_prefixes:
        return []
    file = match_file(parse_file(path), _base_of(family, architecture, model))
    names = app_names or default_apps(format_name, file)
    return [
        f"{result.title}: {problem.text}. {problem.remedy}"
        for result in (simulate_apps(file, names) if names else [])
        for problem in result.problems
        if problem.severity != HIDDEN
    ]


def require_sound(path: Path, errors: Sequence[str]) -> None:
    """Raises VerificationError if there are errors."""
    if errors:
        raise VerificationError(f"{path} was not written: apps would not apply all of it.", errors)


def warn(path: Path, errors: Sequence[str]) -> None:
    """Logs errors as warnings."""
    for error in errors:
        logger.warning("%s: %s", path.name, error)


def published_base(name: str) -> Base:
    """Returns a diffusion base as it was published."""
    family: Family = registry.find("families", name)
    architecture = DIFFUSION[name]
    names = [family.key_map(format_name, None) for format_name in _FORMATS]
    return Base(architecture, published_shapes(architecture), names)


def _named(path: str) -> Base:
    model = find_model(path)
    family: Family = registry.find("families", model.family)
    return _base_of(family, DIFFUSION[family.architecture.name], model)


def _base_of(family: Family, architecture: DiffusionArchitecture, model: ModelOptions) -> Base:
    from lora_diffusion.adapters.state import weight_shapes

    shapes = weight_shapes(family.meta_modules(model))
    return Base(architecture, shapes, [family.key_map(name, model) for name in _FORMATS])
