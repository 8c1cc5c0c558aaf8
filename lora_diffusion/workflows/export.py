"""The adapter of a run in other formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import atomic_path, write_text
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.protocols.format import Format
from lora_diffusion.formats.verified import write_verified
from lora_diffusion.runtime.device import find_dtype
from lora_diffusion.training.run_folder import RunFolder
from lora_diffusion.workflows import _run_checkpoints, model_card, verify
from lora_diffusion.workflows._adapter_files import check_target
from lora_diffusion.workflows._base_and_adapters import read_adapter


@dataclass(frozen=True)
class Export:
    """The adapter of a run in a file."""

    path: Path
    format: str

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"file": str(self.path), "format": self.format}

    def text(self) -> str:
        """Returns lines for people."""
        return f"Wrote {self.path} and read it back: equal."


def export(
    run_path: Path,
    format_name: str,
    output_path: Path,
    *,
    step: int | None = None,
    apps: Sequence[str] = (),
    card: bool = False,
    overwrite: bool = False,
) -> Export:
    """Writes the adapter of a run in a format, if the apps of that format would apply all of it.

    Args:
        run_path: folder of a finished run, or one of its checkpoints.
        format_name: that of the file.
        output_path: file, or folder if the format is one.
        step: take the checkpoint of this step, of a run that need not have finished.
        apps: those that must apply it; without any, those that read the format and the variant.
        card: write a model card, README.md, beside it.
        overwrite: replace what is there.

    Raises:
        ConfigError: no run, no adapter in it, or the output exists and is not to be, or must not be, replaced.
        VerificationError: an app would lose or misread something; nothing is written then.
    """
    checkpoint = _run_checkpoints.find(run_path)
    if checkpoint and step not in (None, checkpoint.step):
        raise ConfigError(f"--step {step}: {run_path} is the checkpoint of step {checkpoint.step}; drop --step.")
    run = RunFolder(checkpoint.run_path if checkpoint else run_path)
    config = run.config()
    family: Family = registry.find("families", config.model.family)
    format_: Format = registry.find("formats", format_name)
    if not checkpoint and step is not None:
        checkpoint = _run_checkpoints.at_step(run.path, step)
    source = checkpoint.folder if checkpoint else run.find_adapter(config)
    check_target(output_path, format_, overwrite)
    card_path = output_path.parent / "README.md"
    if card and card_path.exists() and not overwrite:
        raise ConfigError(f"--card: {card_path} exists; write into another folder, or give --overwrite.")
    state = read_adapter(source, family, config.model)
    key_map = family.key_map(format_name, config.model)
    with atomic_path(output_path) as temporary:
        write_verified(state, key_map, format_, temporary, find_dtype(config.output.dtype))
        errors = verify.app_errors(temporary, format_name, family, config.model, apps)
        verify.require_sound(output_path, errors)
    if card:
        package = model_card.collect_exported(output_path, format_name, run)
        write_text(card_path, model_card.write(package, "."))
    return Export(output_path, format_name)
