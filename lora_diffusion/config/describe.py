"""What the keys mean, and how two configs differ."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

from lora_diffusion.config.load import MARK, to_values
from lora_diffusion.config.rules import as_written
from lora_diffusion.config.schema import Config, field_docs
from lora_diffusion.config.settings import Choice, allowed_values, may_change


def explained_yaml(config: Config) -> str:
    """Returns the resolved config as YAML with the meaning of each key above it."""
    import yaml

    lines = [MARK]
    for section, values in to_values(config).items():
        lines.append(f"{section}:")
        docs = field_docs(type(getattr(config, section)))
        for key, value in values.items():
            meaning = f"{docs.get(key, '')}{_registered(type(getattr(config, section)), key)}"
            lines += textwrap.wrap(meaning, 110, initial_indent="  # ", subsequent_indent="  # ")
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            lines.append(f"  {key}: {shown}")
        lines.append("")
    return "\n".join(lines)


def _registered(section_type: type[Any], key: str) -> str:
    """Returns the choices that other packages can add to, which the string under a setting cannot list."""
    rule = allowed_values(section_type, key)
    return f" Known: {', '.join(rule.choices)}." if isinstance(rule, Choice) and rule.group else ""


def differences(config: Config, other: Config) -> list[str]:
    """Returns "section.key: value -> other value" for each key that differs."""
    return _differences(config, other, lambda *_: True)


def fixed_differences(config: Config, other: Config) -> list[str]:
    """Returns the differences in what must not change when a run is resumed."""
    return _differences(config, other, lambda section_type, key: not may_change(section_type, key))


def _differences(config: Config, other: Config, is_compared: Callable[[type[Any], str], bool]) -> list[str]:
    pairs = [(f.name, getattr(config, f.name), getattr(other, f.name)) for f in dataclasses.fields(Config)]
    return [
        f"{section}.{f.name}: {as_written(getattr(mine, f.name))} -> {as_written(getattr(theirs, f.name, None))}"
        for section, mine, theirs in pairs
        for f in dataclasses.fields(mine)
        if getattr(mine, f.name) != getattr(theirs, f.name, None) and is_compared(type(mine), f.name)
    ]
