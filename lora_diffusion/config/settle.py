"""What a file says gives way where it cannot go together with what the command line says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lora_diffusion.config.rules import as_written, contradictions
from lora_diffusion.config.schema import Config
from lora_diffusion.core.logs import logger


def settle(
    sections: Mapping[str, Any], told: frozenset[str], defaults: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Returns the sections in which settings of a file have given way, with a warning for each.

    Args:
        sections: typed sections.
        told: keys that the command line gave.
        defaults: "section.key" -> default.
        source: what the file is called.
    """
    settled = dict(sections)
    while found := next(_yielding(settled, told, defaults), None):
        key, instead, stronger = found
        _tell(source, key, _at(settled, key), stronger, _at(settled, stronger), instead)
        section, name = key.split(".")
        settled[section] = dataclasses.replace(settled[section], **{name: instead})
    return settled


def give_way(config: Config, key: str, instead: Any, *against: str) -> Config:
    """Returns the config in which a setting has given way, with a warning, unless the command line gave it.

    It stays, too, where nothing on the command line is against it.

    Args:
        config: as it was loaded.
        key: "section.key" of the setting.
        instead: what it becomes.
        against: keys of which the command line must have given one.
    """
    stronger = [other for other in against if config.is_told(other)]
    sections = vars(config)
    if config.is_told(key) or not stronger or _at(sections, key) == instead:
        return config
    _tell("the config", key, _at(sections, key), stronger[0], _at(sections, stronger[0]), instead)
    section, name = key.split(".")
    changed: Any = {section: dataclasses.replace(sections[section], **{name: instead})}
    return dataclasses.replace(config, **changed)


def _yielding(
    sections: Mapping[str, Any], told: frozenset[str], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Yields key, new value, and the key that it gives way to."""
    for found in contradictions(sections):
        stronger = [key for key in found.against if key in told]
        if found.key and found.key not in told and stronger:
            instead = defaults[found.key] if found.instead is None else found.instead
            if instead != _at(sections, found.key):
                yield found.key, instead, stronger[0]


def _at(sections: Mapping[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(sections[section], key)


def _tell(source: str, key: str, value: Any, stronger: str, other: Any, instead: Any) -> None:
    logger.warning(
        "%s=%s of %s gives way to %s=%s; it is %s now.",
        key,
        as_written(value),
        source,
        stronger,
        as_written(other),
        as_written(instead),
    )
