"""What clients would make of adapter files; none of it loads a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.architectures import DIFFUSION
from lora_diffusion.architectures.modules import published_shapes
from lora_diffusion.compat import verify as apps
from lora_diffusion.compat.verify import Base, Verdict
from lora_diffusion.config.schema import ModelOptions
from lora_diffusion.core import registry
from lora_diffusion.core.errors import VerificationError
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.workflows import _run_checkpoints

_SPELLINGS = ("kohya", "diffusers", "peft", "norms")


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    path: Path
    base: str
    verdicts: tuple[Verdict, ...]

    @property
    def is_sound(self) -> bool:
        """Says whether every client applies all of it as we would."""
        return all(verdict.is_sound for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "file": str(self.path),
            "base": self.base,
            "sound": self.is_sound,
            "clients": [verdict.to_json() for verdict in self.verdicts],
        }

    def text(self) -> str:
        """Returns lines for people."""
        lines = [f"{self.path} on {self.base}", *(line for verdict in self.verdicts for line in verdict.lines())]
        return "\n".join(lines)


def verify(path: Path, client_names: Sequence[str] = (), base: str | None = None) -> Verification:
    """Says what clients would ignore, misread or hide of an adapter file.

    Args:
        path: file, PEFT folder, or checkpoint of a run, which is looked at as the file that it would become.
        client_names: all known clients without any.
        base: sd1, sd2, sdxl, or what `model.path` takes; without it, the published base that the content is made for.

    Raises:
        AdapterFileError: the file cannot be read, or does not tell its base.
        ConfigError: there is no such client.
        ModelError: the base cannot be used.
        UnsupportedError: the file is for a kind of base that is not known here.
    """
    with _run_checkpoints.as_file(path) as file:
        apps.refuse_other(file)
        name = base or apps.guess_family(file)
        found = published_base(name) if name in DIFFUSION else _named(name)
        if base is None:
            apps.check_fit(file, found)
        return Verification(path, name, tuple(apps.verify(file, found, client_names)))


def faults(path: Path, format_name: str, family: Family, model: ModelOptions, client_names: Sequence[str]) -> list[str]:
    """Returns what the clients of a written file would lose or misread, one line for each fault.

    Args:
        path: the file or folder.
        format_name: its spelling.
        family: of the base. For one that clients do not know, nothing is looked for.
        model: the base.
        client_names: without any, those that the spelling is meant for and that read its kind of adapter.
    """
    if family.architecture.name not in DIFFUSION:
        return []
    base = _of(family, model)
    names = client_names or apps.default_clients(format_name, path, base)
    verdicts = apps.verify(path, base, names) if names else []
    return [
        f"{verdict.title}: {problem.text}. {problem.remedy}"
        for verdict in verdicts
        for problem in verdict.problems
        if problem.severity != apps.HIDDEN
    ]


def require_sound(path: Path, found: Sequence[str]) -> None:
    """Raises VerificationError if there are faults."""
    if found:
        raise VerificationError(f"{path} was not written: clients would not apply all of it.", found)


def warn(path: Path, found: Sequence[str]) -> None:
    """Logs faults as warnings."""
    for fault in found:
        logger.warning("%s: %s", path.name, fault)


def published_base(name: str) -> Base:
    """Returns sd1, sd2 or sdxl as they were published."""
    family: Family = registry.find("families", name)
    return Base(name, published_shapes(DIFFUSION[name]), [family.key_map(spelling, None) for spelling in _SPELLINGS])


def _named(path: str) -> Base:
    from lora_diffusion.workflows.merge import find_model

    model = find_model(path)
    return _of(registry.find("families", model.family), model)


def _of(family: Family, model: ModelOptions) -> Base:
    from lora_diffusion.adapters.state import weight_shapes

    shapes = weight_shapes(family.meta_modules(model))
    return Base(family.architecture.name, shapes, [family.key_map(name, model) for name in _SPELLINGS])
