"""What the keys mean, and how two configs differ."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from lora_diffusion.config.load import MARK, to_values
from lora_diffusion.config.rules import as_written
from lora_diffusion.config.schema import FREE_SECTIONS, Config, field_docs


def explained_yaml(config: Config) -> str:
    """Returns the resolved config as YAML with the meaning of each key above it."""
    import yaml

    lines = [MARK]
    for section, values in to_values(config).items():
        lines.append(f"{section}:")
        docs = field_docs(type(getattr(config, section)))
        for key, value in values.items():
            lines += textwrap.wrap(docs.get(key, ""), 110, initial_indent="  # ", subsequent_indent="  # ")
            shown = yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()
            lines.append(f"  {key}: {shown}")
        lines.append("")
    return "\n".join(lines)


def differences(config: Config, other: Config) -> list[str]:
    """Returns "section.key: value -> other value" for each key that differs."""
    return [
        f"{section}.{f.name}: {as_written(getattr(mine, f.name))} -> {as_written(getattr(theirs, f.name, None))}"
        for section, mine, theirs in _paired_sections(config, other)
        for f in dataclasses.fields(mine)
        if getattr(mine, f.name) != getattr(theirs, f.name, None)
    ]


def fixed_differences(config: Config, other: Config) -> list[str]:
    """Returns the differences in what must not change when a run is resumed."""
    sections = [f.name for f in dataclasses.fields(Config) if f.name not in FREE_SECTIONS]
    free = [f"{name}.{key}: " for name in sections for key in getattr(getattr(config, name), "free", ())]
    free += [f"{name}." for name in FREE_SECTIONS]
    return [line for line in differences(config, other) if not line.startswith(tuple(free))]


def _paired_sections(config: Config, other: Config) -> Iterator[tuple[str, Any, Any]]:
    for f in dataclasses.fields(Config):
        yield f.name, getattr(config, f.name), getattr(other, f.name)
