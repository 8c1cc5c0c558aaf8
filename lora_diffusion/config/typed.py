"""Values as a file spells them -> typed sections."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from lora_diffusion.core.logs import shown
from lora_diffusion.core.plain_yaml import Plain

_SPELLED: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class _MisfitError(ValueError):
    """The value is of another type."""


class _UnclearError(ValueError):
    """Nobody can say what the value was meant to be."""


def convert(
    values: Mapping[str, Any], schema: Mapping[str, type[Any]], family_defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns typed section objects and the faults of those values that have the wrong type.

    Args:
        values: section -> key -> value as `plain_yaml` reads it; keys that are unknown are passed over.
        schema: section -> its class.
        family_defaults: "section.key" -> default that the family brings.
    """
    sections, faults = {}, []
    for name, section_type in schema.items():
        given = values.get(name)
        hints = typing.get_type_hints(section_type)
        own = {key.partition(".")[2]: value for key, value in family_defaults.items() if key.startswith(f"{name}.")}
        for key, value in given.items() if isinstance(given, dict) else ():
            if key not in hints:
                continue
            try:
                own[key] = _typed(value, hints[key])
            except _MisfitError:
                faults.append(f"{name}.{key}={_given(value)}: must be {_spell(hints[key])}")
            except _UnclearError as error:
                faults.append(f"{name}.{key}: {error}")
        sections[name] = section_type(**own)
    return sections, faults


def defaults(schema: Mapping[str, type[Any]], family_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns "section.key" -> default of every key."""
    sections, _ = convert({}, schema, family_defaults)
    return {f"{name}.{key}": value for name, section in sections.items() for key, value in vars(section).items()}


def is_list(hint: Any) -> bool:
    """Says whether the type of a key is a list of texts or numbers."""
    return typing.get_origin(hint) is tuple


def _typed(value: Any, hint: Any) -> Any:
    if is_list(hint):
        (item, *_) = typing.get_args(hint)
        # One alone needs no brackets.
        return tuple(_typed(one, item) for one in (value if isinstance(value, list) else [value]))
    if not isinstance(value, str):
        raise _MisfitError
    members = typing.get_args(hint) or (hint,)
    meaning = value.meaning if isinstance(value, Plain) else value
    if type(meaning) in members and (meaning is None or isinstance(meaning, bool)):
        return meaning
    if isinstance(meaning, bool) and str in members:
        raise _UnclearError(f"YAML reads a bare yes, no, on or off as {meaning}; put the text in quotes")
    if meaning is None or isinstance(meaning, bool):
        raise _MisfitError
    if isinstance(meaning, int) and int in members:
        return meaning
    if isinstance(meaning, int | float) and float in members:
        return float(meaning)
    if str not in members:
        raise _MisfitError
    # As it is written, 007 and 1.10 included.
    return str(value)


def _given(value: Any) -> str:
    return shown(repr(value.meaning if isinstance(value, Plain) else value))


def _spell(hint: Any) -> str:
    if is_list(hint):
        return f"a list, each {_spell(typing.get_args(hint)[0])}"
    members = typing.get_args(hint)
    return " or ".join(_spell(member) for member in members) if members else _SPELLED.get(hint, str(hint))
