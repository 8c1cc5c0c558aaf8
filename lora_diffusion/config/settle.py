"""What a file says gives way where it cannot go together with what the command line says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from lora_diffusion.config.rules import as_written, contradictions
from lora_diffusion.config.schema import Config
from lora_diffusion.core.logs import logger


def settle(
    sections: Mapping[str, Any], given: frozenset[str], defaults: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Returns the sections in which settings of a file have given way, with a warning for each.

    Args:
        sections: typed sections.
        given: keys that the command line gave.
        defaults: "section.key" -> default.
        source: what the file is called.
    """
    settled = dict(sections)
    while contradiction := next(_yielding(settled, given, defaults), None):
        key, instead, stronger = contradiction
        _warn(source, key, _at(settled, key), stronger, _at(settled, stronger), instead)
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
    stronger = [other for other in against if config.is_given(other)]
    sections = vars(config)
    if config.is_given(key) or not stronger or _at(sections, key) == instead:
        return config
    _warn("the config", key, _at(sections, key), stronger[0], _at(sections, stronger[0]), instead)
    section, name = key.split(".")
    changed: Any = {section: dataclasses.replace(sections[section], **{name: instead})}
    return dataclasses.replace(config, **changed)


def _yielding(
    sections: Mapping[str, Any], given: frozenset[str], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str]]:
    """Yields key, new value, and the key that it gives way to."""
    for contradiction in contradictions(sections):
        stronger = [key for key in contradiction.against if key in given]
        if contradiction.key and contradiction.key not in given and stronger:
            instead = defaults[contradiction.key] if contradiction.instead is None else contradiction.instead
            if instead != _at(sections, contradiction.key):
                yield contradiction.key, instead, stronger[0]


def _at(sections: Mapping[str, Any], dotted: str) -> Any:
    section, key = dotted.split(".")
    return getattr(sections[section], key)


def _warn(source: str, key: str, value: Any, stronger: str, other: Any, instead: Any) -> None:
    logger.warning(
        "%s=%s of %s gives way to %s=%s; it is %s now.",
        key,
        as_written(value),
        source,
        stronger,
        as_written(other),
        as_written(instead),
    )
