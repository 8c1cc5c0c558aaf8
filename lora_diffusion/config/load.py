"""YAML file and `key=value` overrides -> Config. All errors are collected and raised at once.

Nothing is looked up: `${...}`, like all else that a text may hold, stays as it stands.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion.config import plain_yaml
from lora_diffusion.config.importers.other_files import refuse_others
from lora_diffusion.config.importers.other_trainers import key_hint, section_hint
from lora_diffusion.config.plain_yaml import Plain
from lora_diffusion.config.rules import contradictions, out_of_range
from lora_diffusion.config.schema import REQUIRED, Config, ModelOptions, data_section, field_docs
from lora_diffusion.config.settle import settle
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.protocols.family import Family
from lora_diffusion.core.text import name_some, shown, suggestion

_TYPE_NAMES: dict[Any, str] = {
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
    """Returns typed section objects and the errors of those values that have the wrong type.

    Args:
        values: section -> key -> value as `plain_yaml` reads it; keys that are unknown are passed over.
        schema: section -> its class.
        family_defaults: "section.key" -> default that the family brings.
    """
    sections, errors = {}, []
    for name, section_type in schema.items():
        given = values.get(name)
        hints = typing.get_type_hints(section_type)
        typed = {key.partition(".")[2]: value for key, value in family_defaults.items() if key.startswith(f"{name}.")}
        for key, value in given.items() if isinstance(given, dict) else ():
            if key not in hints:
                continue
            try:
                typed[key] = _typed(value, hints[key])
            except _MisfitError:
                errors.append(f"{name}.{key}={_given(value)}: must be {_type_name(hints[key])}")
            except _UnclearError as error:
                errors.append(f"{name}.{key}: {error}")
        sections[name] = section_type(**typed)
    return sections, errors


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


def _type_name(hint: Any) -> str:
    if is_list(hint):
        return f"a list, each {_type_name(typing.get_args(hint)[0])}"
    members = typing.get_args(hint)
    return " or ".join(_type_name(member) for member in members) if members else _TYPE_NAMES.get(hint, str(hint))


def shipped() -> dict[str, tuple[Path, str]]:
    """Returns name -> (file, first comment line) of the configs that come along, say "sd1/style"."""
    root = shipped_path("configs")
    configs = {}
    for path in sorted(set(root.rglob("*.yaml")) - set(root.glob("evaluate/*"))):
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        configs[path.relative_to(root).with_suffix("").as_posix()] = (path, first.lstrip("# "))
    return configs


def find_shipped(name: str) -> Path:
    """Returns the file of a shipped config.

    Raises:
        ConfigError: no such config; offers close names.
    """
    configs = shipped()
    if name not in configs:
        raise ConfigError(f"No config is called {name!r}{suggestion(name, configs)}. Known: {', '.join(configs)}.")
    return configs[name][0]


_OVERRIDE = re.compile(r"([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", re.DOTALL)
MARK = "# All settings of a run, as lora-diffusion resolved them; texts stand as they are."
"""First line of a resolved config. Those of versions that knew references have none, and a backslash before `${`."""
_REFERENCE = re.compile(r"(\\*)\$\{")


def load(
    path: Path | None, overrides: Sequence[str] = (), *, required: bool = True, unused: Sequence[str] = ()
) -> Config:
    """Reads a config.

    What the overrides say wins over the file: a setting of the file that cannot go together with them gives way, and a
    warning tells it.

    Args:
        path: YAML file, or the name of a shipped config such as sd1/style; None starts from the defaults.
        overrides: "section.key=value", the value in YAML; where the key is a text, as it stands.
        required: refuse a config that lacks a value which has no default.
        unused: keys that may lack all the same.

    Raises:
        ConfigError: lists every unknown key, wrong type, missing value and broken rule.
    """
    source = str(path) if path else "the command line"
    in_file = _read(path) if path else {}
    family = _family(in_file, overrides)
    schema = _typed_sections(family)
    given = _nested(overrides, schema)
    values = _merged(in_file, given)
    errors = list(_unknown_keys(values, schema))
    sections, type_errors = convert(values, schema, family.options_type.defaults)
    errors += type_errors
    errors += out_of_range(sections)
    if required:
        errors += _missing(sections, unused)
    nested = {section: keys for section, keys in given.items() if isinstance(keys, dict)}
    given_keys = frozenset(f"{section}.{key}" for section, keys in nested.items() for key in keys)
    if not errors:
        sections = settle(sections, given_keys, defaults(schema, family.options_type.defaults), source)
        errors += dict.fromkeys(one.text for one in contradictions(sections))
    if errors:
        raise ConfigError(
            f"The config from {source} has {len(errors)} error(s); correct them or see the keys with "
            "'lora-diffusion config show'.",
            errors,
        )
    return Config(**sections, given=given_keys)


def to_values(config: Config) -> dict[str, Any]:
    """Returns the config as plain nested values that `load` accepts unchanged."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """Returns the fully resolved config as YAML."""
    import yaml

    return f"{MARK}\n{yaml.safe_dump(to_values(config), allow_unicode=True, sort_keys=False)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(path: Path) -> dict[str, Any]:
    known = shipped()
    if path.is_dir():
        inside = path / "config.yaml"
        advice = f"give {inside}" if inside.is_file() else "give a YAML file"
        raise ConfigError(f"{path} is a folder, not a config file; {advice}.")
    if not path.is_file() and str(path) not in known:
        hint = suggestion(str(path), known)
        raise ConfigError(
            f"There is no config file {path}{hint}; 'lora-diffusion config list' shows those that come along."
        )
    file = path if path.is_file() else known[str(path)][0]
    try:
        text = plain_yaml.read_text(file)
    except (OSError, plain_yaml.YamlError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}.") from error
    try:
        values = plain_yaml.parse(text)
    except plain_yaml.YamlError as error:
        refuse_others(path, text, None)
        raise ConfigError(f"{path} is not a YAML file: {error}.") from error
    if values is None:
        return {}
    refuse_others(path, text, values)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no sections such as 'model:' and 'data:', but {shown(repr(values))}.")
    return _unescaped(values, path, text)


def _unescaped(values: dict[str, Any], path: Path, text: str) -> dict[str, Any]:
    """Takes the backslashes away that older versions wrote before `${` in resolved configs; tells of others."""
    if "\\" not in text or text.startswith((MARK, "{")):
        return values
    texts = [match for item in _texts(values) for match in _REFERENCE.finditer(item)]
    is_resolved = set(values) >= {f.name for f in dataclasses.fields(Config)}
    if is_resolved and all(len(match[1]) % 2 for match in texts):
        return typing.cast(dict[str, Any], _without_escapes(values))
    if escaped := [match.string for match in texts if match[1]]:
        logger.warning(
            "%s: the backslash before ${ is kept, as ${ refers to nothing and needs none: %s",
            path,
            name_some([shown(item) for item in escaped]),
        )
    return values


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _without_escapes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_escapes(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_escapes(item) for item in value]
    plain = _REFERENCE.sub(lambda match: match[1][len(match[1]) // 2 + 1 :] + "${", value)
    # A Plain text that needs no change stays one.
    return plain if plain != value else value


def _nested(overrides: Sequence[str], schema: Mapping[str, type[Any]]) -> dict[str, Any]:
    """Returns what the overrides say, in sections; later ones win."""
    given: dict[str, Any] = {}
    for override in overrides:
        match = _parts(override)
        value = _value(match, schema, override)
        for key in reversed(match[2].split(".")[1:]):
            value = {key: value}
        given = _merged(given, {match[1]: value})
    return given


def _parts(override: str) -> re.Match[str]:
    match = _OVERRIDE.fullmatch(override)
    if not match:
        raise ConfigError(f"{shown(override)!r} is not an override; write section.key=value, say train.max_steps=500.")
    return match


def _value(match: re.Match[str], schema: Mapping[str, type[Any]], override: str) -> Any:
    """Reads a value as YAML; that of a text is taken as it stands: "a #b", "sks: dog", "007", "no"."""
    section, key, value = match[1], match[2].removeprefix("."), match[3]
    hint = typing.get_type_hints(schema[section]).get(key) if section in schema else None
    members = typing.get_args(hint) or (hint,)
    is_text = str in members and not value.startswith(('"', "'")) and not (value == "null" and type(None) in members)
    if is_list(hint):
        is_text = is_text and value not in ("", "null") and not value.startswith("[")
    if is_text:
        return value
    try:
        parsed = plain_yaml.parse(value)
    except plain_yaml.YamlError as error:
        raise ConfigError(f"{shown(override)}: its value is no YAML: {error}.") from error
    return plain_yaml.Plain("null") if parsed is None else parsed


def _merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values with the others in their place, mappings merged."""
    merged = dict(values)
    for key, other in others.items():
        mine = merged.get(key)
        merged[key] = _merged(mine, other) if isinstance(mine, dict) and isinstance(other, dict) else other
    return merged


def _family(in_file: Mapping[str, Any], overrides: Sequence[str]) -> Family:
    model = in_file.get("model")
    name = model.get("family", ModelOptions.family) if isinstance(model, dict) else ModelOptions.family
    given = [match[3] for override in overrides if (match := _parts(override))[1] + match[2] == "model.family"]
    return typing.cast(Family, registry.find("families", str(given[-1] if given else name), "model.family"))


def _typed_sections(family: Family) -> dict[str, type[Any]]:
    special = {"model": family.options_type, "data": data_section(family.sample_type)}
    hints = typing.get_type_hints(Config) | special
    return {f.name: hints[f.name] for f in dataclasses.fields(Config)}


def _unknown_keys(values: Mapping[str, Any], schema: Mapping[str, type[Any]]) -> Iterator[str]:
    known = {f"{name}.{f.name}" for name, section in schema.items() for f in dataclasses.fields(section)}
    for name, section in values.items():
        if name in known:
            first, _, key = name.partition(".")
            yield f"{name}: in a file, write '{first}:' and below it, indented, '{key}: ...'"
        elif name not in schema:
            yield f"{shown(name)}: there is no such section{section_hint(name, schema, known)}"
        elif not isinstance(section, dict):
            yield f"{name}: is a section; write its keys below it, such as {_first_key(name, schema)}"
        else:
            for key in section:
                if f"{name}.{key}" not in known:
                    yield f"{name}.{shown(key)}: there is no such key{key_hint(f'{name}.{key}', known)}"


def _first_key(section: str, schema: Mapping[str, type[Any]]) -> str:
    return f"{section}.{dataclasses.fields(schema[section])[0].name}"


def _missing(sections: Mapping[str, Any], unused: Sequence[str]) -> list[str]:
    return [
        f"{name}.{f.name}: must be given: {_doc(type(section), f.name)}"
        for name, section in sections.items()
        for f in dataclasses.fields(section)
        if getattr(section, f.name) == REQUIRED and f"{name}.{f.name}" not in unused
    ]


def _doc(section_type: type[Any], key: str) -> str:
    return field_docs(section_type).get(key, "").rstrip(".")
