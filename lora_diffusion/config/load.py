"""YAML file and `key=value` overrides -> Config. All faults are collected and raised at once."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_diffusion.config.docs import field_docs
from lora_diffusion.config.rules import contradictions, out_of_range
from lora_diffusion.config.schema import DATA_SECTIONS, REQUIRED, Config, ModelOptions
from lora_diffusion.config.shipped import shipped
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.keymap import question, suggestion
from lora_diffusion.core.protocols import Family

_OVERRIDE = re.compile(r"([A-Za-z_]\w*)((?:\.\w+)*)=(.*)", re.DOTALL)


def load(
    path: Path | None, overrides: Sequence[str] = (), *, required: bool = True, unused: Sequence[str] = ()
) -> Config:
    """Reads a config.

    Args:
        path: YAML file, or the name of a shipped config such as sd1/style; None starts from the defaults.
        overrides: "section.key=value", the value in YAML; where the key is a text, as it stands.
        required: refuse a config that lacks a value which has no default.
        unused: keys that may lack all the same.

    Raises:
        ConfigError: lists every unknown key, wrong type, missing value and broken rule.
    """
    source = str(path) if path else "the command line"
    values = _read(path) if path else {}
    _check_form(overrides)
    chosen = [override for override in overrides if override.startswith("model.family=")]
    family = _family(_merged(values, chosen))
    schema = _typed_sections(family)
    values = _merged(values, [_quoted(override, schema) for override in overrides])
    faults = list(_unknown_keys(values, schema))
    sections, type_faults = _convert(values, schema, family.options_type.defaults)
    faults += type_faults
    if required:
        faults += _missing(sections, unused)
    faults += out_of_range(sections)
    if not faults:
        faults += contradictions(sections)
    if faults:
        raise ConfigError(
            f"The config from {source} has {len(faults)} fault(s); mend them or see the keys with "
            "'lora-diffusion config show'.",
            faults,
        )
    return Config(**sections)


def to_values(config: Config) -> dict[str, Any]:
    """Returns the config as plain nested values that `load` accepts unchanged."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def to_yaml(config: Config) -> str:
    """Returns the fully resolved config as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_escaped(to_values(config))))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _escaped(value: Any) -> Any:
    """Puts a backslash before "${" in texts, where it would refer to another key."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value) if isinstance(value, str) else value


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    known = shipped()
    if not path.is_file() and str(path) not in known:
        hint = suggestion(str(path), known)
        raise ConfigError(
            f"There is no config file {path}{hint}; 'lora-diffusion config list' shows those that come along."
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path if path.is_file() else known[str(path)][0]))
    except (yaml.YAMLError, OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not sections such as 'model:' and 'data:'.")
    return typing.cast(dict[str, Any], values)


def _check_form(overrides: Sequence[str]) -> None:
    for override in overrides:
        if not _OVERRIDE.fullmatch(override):
            raise ConfigError(f"{override!r} is not an override; write section.key=value, say train.max_steps=500.")


def _merged(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        return typing.cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except (GrammarParseError, InterpolationResolutionError) as error:
        raise ConfigError(
            f"{getattr(error, 'full_key', None) or 'A value'}: {_first_line(error)}. ${{...}} stands for the value of "
            "another key, such as ${output.name}; write \\${ where the characters themselves are meant."
        ) from error
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"The overrides {' '.join(overrides)} do not fit the config: {_first_line(error)}") from error


def _quoted(override: str, schema: Mapping[str, type[Any]]) -> str:
    """Puts the value of a text in quotes, so that YAML takes it as it stands: "a #b", "sks: dog", "007", "no"."""
    match = _OVERRIDE.fullmatch(override)
    assert match, "_check_form was called before"
    section, key, value = match[1], match[2].removeprefix("."), match[3]
    hint = typing.get_type_hints(schema[section]).get(key) if section in schema else None
    members = typing.get_args(hint) or (hint,)
    is_plain = str in members and not value.startswith(('"', "'")) and not (value == "null" and type(None) in members)
    if _is_list(hint):
        is_plain = is_plain and value not in ("", "null") and not value.startswith("[")
    return f"{section}.{key}={json.dumps(value, ensure_ascii=False)}" if is_plain else override


def _family(values: Mapping[str, Any]) -> Family:
    model = values.get("model")
    name = model.get("family", ModelOptions.family) if isinstance(model, Mapping) else ModelOptions.family
    return typing.cast(Family, registry.find("families", str(name)))


def _typed_sections(family: Family) -> dict[str, type[Any]]:
    typed = {"model": family.options_type, "data": DATA_SECTIONS[family.sample_type]}
    hints = typing.get_type_hints(Config) | typed
    return {f.name: hints[f.name] for f in dataclasses.fields(Config)}


def _unknown_keys(values: Mapping[str, Any], schema: Mapping[str, type[Any]]) -> Iterator[str]:
    known = {f"{name}.{f.name}" for name, section in schema.items() for f in dataclasses.fields(section)}
    for name, section in values.items():
        if name not in schema:
            yield f"{name}: there is no such section{suggestion(str(name), schema) or _suggest_key(str(name), known)}"
        elif not isinstance(section, Mapping):
            yield f"{name}: is a section; write its keys below it, such as {_first_key(name, schema)}"
        else:
            for key in section:
                if f"{name}.{key}" not in known:
                    yield f"{name}.{key}: there is no such key{_suggest_key(f'{name}.{key}', known)}"


def _first_key(section: str, schema: Mapping[str, type[Any]]) -> str:
    return f"{section}.{dataclasses.fields(schema[section])[0].name}"


def _suggest_key(dotted: str, known: set[str]) -> str:
    """Offers the same key of another section, else keys of any section that are spelled alike."""
    section, _, key = dotted.rpartition(".")
    # Keys of the same section come last, so that they win over equal ones of others.
    ordered = sorted(known, key=lambda name: (name.startswith(f"{section}."), name))
    by_key = {name.split(".", 1)[1]: name for name in ordered}
    close = [key] if key in by_key else difflib.get_close_matches(key, list(by_key), n=2, cutoff=0.7)
    return question(by_key[match] for match in close)


def _convert(
    values: Mapping[str, Any], schema: Mapping[str, type[Any]], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Returns typed section objects and the faults of those values that have the wrong type."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sections, faults = {}, []
    for name, section_type in schema.items():
        section = OmegaConf.structured(section_type)
        OmegaConf.set_readonly(section, False)
        for key, value in defaults.items():
            if key.startswith(f"{name}."):
                OmegaConf.update(section, key.removeprefix(f"{name}."), _plain(value))
        given = values.get(name)
        hints = typing.get_type_hints(section_type)
        for key, value in given.items() if isinstance(given, Mapping) else ():
            if key not in hints:
                continue
            if not _is_typed(value, hints[key]):
                faults.append(f"{name}.{key}={value!r}: must be {_spell(hints[key])}")
                continue
            try:
                alone = _is_list(hints[key]) and isinstance(value, str | int | float)
                OmegaConf.update(section, key, _escaped([value] if alone else value))
            except (OmegaConfBaseException, ValueError, TypeError):
                faults.append(f"{name}.{key}={value!r}: must be {_spell(hints[key])}")
            if isinstance(value, bool) and str in (typing.get_args(hints[key]) or (hints[key],)):
                faults.append(f"{name}.{key}: YAML reads a bare yes, no, on or off as {value}; put the text in quotes")
        typed = typing.cast(dict[str, Any], OmegaConf.to_container(section, resolve=True))
        sections[name] = section_type(**{key: _tuples(value) for key, value in typed.items()})
    return sections, faults


def _is_typed(value: Any, hint: Any) -> bool:
    """Says whether numbers and truth values are written as such; OmegaConf would take "500" for 500 and 5 for true."""
    if _is_list(hint):
        own = typing.get_args(hint)[0]
        return all(_is_typed(item, own) for item in value) if isinstance(value, list) else _is_typed(value, own)
    members = set(typing.get_args(hint) or (hint,))
    if isinstance(value, bool):
        return bool(members & {bool, str})
    if isinstance(value, int):
        return bool(members & {int, float, str})
    if isinstance(value, str):
        return not members <= {int, float, bool, type(None)}
    return True


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


_SPELLED: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _spell(hint: Any) -> str:
    if _is_list(hint):
        return f"a list, each {_spell(typing.get_args(hint)[0])}"
    members = typing.get_args(hint)
    return " or ".join(_spell(member) for member in members) if members else _SPELLED.get(hint, str(hint))


def _missing(sections: Mapping[str, Any], unused: Sequence[str]) -> list[str]:
    return [
        f"{name}.{f.name}: must be given: {_doc(type(section), f.name)}"
        for name, section in sections.items()
        for f in dataclasses.fields(section)
        if getattr(section, f.name) == REQUIRED and f"{name}.{f.name}" not in unused
    ]


def _doc(section_type: type[Any], key: str) -> str:
    return field_docs(section_type).get(key, "").rstrip(".")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
