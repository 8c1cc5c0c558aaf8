"""Config files: those that come along, one of them copied, one checked, all its values explained; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_diffusion.adapters import variants
from lora_diffusion.config.describe import explained_yaml
from lora_diffusion.config.load import find_shipped, shipped, to_values
from lora_diffusion.config.schema import Config
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import write_text


@dataclass(frozen=True)
class ShippedConfigs:
    """The configs that come along."""

    summaries: Mapping[str, str]
    """Name, as `--config` takes it -> first line of the file."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return dict(self.summaries)

    def text(self) -> str:
        """Returns one line for each."""
        width = max(map(len, self.summaries))
        return "\n".join(f"{name:<{width}}  {summary}" for name, summary in self.summaries.items())


@dataclass(frozen=True)
class CopiedConfig:
    """A config that was copied."""

    path: Path

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"file": str(self.path)}

    def text(self) -> str:
        """Returns lines for people."""
        return f"Wrote {self.path}; run it with: lora-diffusion train --config {self.path}"


@dataclass(frozen=True)
class CheckedConfig:
    """A config without errors."""

    path: Path | None
    """None where all of it came from the command line."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {"file": str(self.path), "ok": True}

    def text(self) -> str:
        """Returns lines for people."""
        return f"{self.path or 'The config'} is right."


@dataclass(frozen=True)
class ShownConfig:
    """All values of a config."""

    config: Config

    def to_json(self) -> dict[str, Any]:
        """Returns section -> key -> value."""
        return to_values(self.config)

    def text(self) -> str:
        """Returns YAML that explains each key."""
        return explained_yaml(self.config)


def list_configs() -> ShippedConfigs:
    """Returns name and first line of each config that comes along."""
    return ShippedConfigs({name: summary for name, (_, summary) in shipped().items()})


def copy_config(name: str, target: Path | None = None) -> CopiedConfig:
    """Copies one of them, never over a file.

    Args:
        name: as `list_configs` gives it.
        target: new file; None takes its name, in the working directory.

    Raises:
        ConfigError: no such config, or the file is there.
    """
    source = find_shipped(name)
    path = target or Path(source.name)
    if path.exists():
        raise ConfigError(f"{path} exists; give another name: lora-diffusion config copy {name} NEW.yaml")
    write_text(path, source.read_text(encoding="utf-8"))
    return CopiedConfig(path)


def check_config(config: Config, path: Path | None = None) -> CheckedConfig:
    """Checks what a loaded config, which `load` accepted, cannot know by itself.

    Args:
        config: as it was loaded.
        path: where from, for the result.

    Raises:
        UnsupportedError: the adapter cannot train on a base that is stored so.
    """
    variants.find(config.adapter.variant, config.model.quantization)
    return CheckedConfig(path)
