"""Prompt suites: short YAML files that map a group of prompt to its templates.

    subject:
      - a {trigger} {class} in the jungle
      - {prompt: "an image of a {trigger}", plain: "an image of a {class}", meaning: "a photo of a {class}"}
    prior:
      - a {class}

A template is a text, or a mapping with `prompt` and, where they do not follow from it, `plain` (the prompt without the
trigger words: the control prompt) and `meaning` (what it shows, in words that the scorer knows: the scoring caption;
else the control prompt).

Placeholders: {trigger}, the words that call the adapter up, and {class}, what is trained in words that everybody knows;
{trigger2}, {class2}, ... are those of further adapters. "a" before a placeholder becomes "an" where that is right. All
else is text, ${...} too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lora_diffusion.config import plain_yaml
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown, suggestion
from lora_diffusion.data.captions import phrase_pattern, without_trigger, words_pattern
from lora_diffusion.evaluation.results import ALL, Case

_KEYS = ("prompt", "plain", "meaning")
_PLACEHOLDER = re.compile(r"(?<!\$)\{(trigger|class)([2-9]?)\}")
_ANY_BRACES = re.compile(r"(?P<text>\$\{[^{}]*\}?)|\{[^{}]*\}|[{}]")
"""`${` is text, here as in configs."""
_LONGEST = 20_000
_MOST_ERRORS = 30
_ARTICLE = r"\b([Aa])n?(?=\s+{word}(?!\w))"


def shipped_suites() -> dict[str, Path]:
    """Returns name -> file of the suites that come along."""
    return {path.stem: path for path in sorted((shipped_path("configs") / "evaluate").glob("*.yaml"))}


def read_cases(
    source: str | Path, triggers: Sequence[str] = (), classes: Sequence[str] = (), setting: str = "--prompts "
) -> tuple[Case, ...]:
    """Returns the cases of a suite with its placeholders filled in; equal prompts of a group are one case, the first.

    Args:
        source: YAML file, or name of a shipped suite.
        triggers: {trigger}, {trigger2}, ...
        classes: {class}, {class2}, ...
        setting: how the user named the source, for messages.

    Raises:
        ConfigError: no such suite, or it is wrong; all errors of the file are listed at once.
    """
    path = _find(source, setting)
    values = {f"trigger{i or ''}": word for i, word in _numbered(triggers)}
    values |= {f"class{i or ''}": word for i, word in _numbered(classes)}
    errors: list[str] = []
    cases: dict[tuple[str, str], Case] = {}
    repeated: list[str] = []
    for group, entry in _entries(path, errors):
        errors_of_entry = [error for text in entry.values() for error in _placeholder_errors(text, values)]
        errors += errors_of_entry
        if not errors_of_entry:
            case = _case(len(cases), group, entry, values, path.stem)
            repeated += [case.prompt] if (case.group, case.prompt) in cases else []
            cases.setdefault((case.group, case.prompt), case)
    if errors:
        distinct = list(dict.fromkeys(errors))
        more = [f"and {len(distinct) - _MOST_ERRORS} more"] if len(distinct) > _MOST_ERRORS else []
        raise ConfigError(f"{setting}{path} has {len(distinct)} error(s).", distinct[:_MOST_ERRORS] + more)
    if repeated:
        # From the same noise they would be the same images, and be counted as more.
        logger.warning("%s repeats %d prompt(s), which count once: %s", path, len(repeated), name_some(repeated))
    return tuple(cases.values())


def control_prompts(captions: Sequence[str], trigger: str) -> list[str]:
    """Returns captions without the trigger words, which are their control prompts; "" for no trigger leaves them."""
    pattern = words_pattern(trigger) if trigger else None
    return [without_trigger(caption, pattern) if pattern else caption for caption in captions]


def _find(source: str | Path, setting: str) -> Path:
    known = shipped_suites()
    path = Path(source) if Path(source).is_file() else known.get(str(source))
    if path is None:
        raise ConfigError(
            f"{setting}{source}: there is no such file or suite{suggestion(str(source), known)}. "
            f"Suites that come along: {', '.join(known)}."
        )
    return path


def check_used(
    source: str | Path, triggers: Sequence[str], classes: Sequence[str], setting: str = "--prompts "
) -> list[str]:
    """Returns an error for each word of the user for which a suite has no placeholder.

    Args:
        source: YAML file, or name of a shipped suite, that `read_cases` takes.
        triggers: for {trigger}, {trigger2}, ..., as the user gave them.
        classes: for {class}, {class2}, ...
        setting: how the user named the source, for messages.
    """
    texts = [text for _, entry in _entries(_find(source, setting), []) for text in entry.values()]
    used = {match[1] + match[2] for text in texts for match in _PLACEHOLDER.finditer(text)}
    given = {f"trigger{i or ''}": word for i, word in _numbered(triggers)}
    given |= {f"class{i or ''}": word for i, word in _numbered(classes)}
    return [
        f"{word!r} does nothing: no prompt of {setting}{source} has the placeholder {{{name}}}; drop it, or add one."
        for name, word in given.items()
        if name not in used
    ]


def _numbered(words: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yields (0, first), (2, second), (3, third), ..."""
    yield from ((index + 1 if index else 0, word) for index, word in enumerate(words))


def _entries(path: Path, errors: list[str]) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yields (group, texts) of each template, or adds errors."""
    try:
        content = plain_yaml.parse(plain_yaml.read_text(path))
    except (plain_yaml.YamlError, OSError) as error:
        errors.append(f"is not a YAML file: {error}")
        return
    if not isinstance(content, dict) or not content:
        errors.append("must map groups of prompts to lists of them, say 'subject:' and below it '- a {trigger} dog'")
        return
    for group, templates in content.items():
        if not re.fullmatch(r"[a-z][a-z_]*", group) or group == ALL:
            errors.append(f"{shown(group)}: a group is a word in small letters, and not '{ALL}'")
        elif not isinstance(templates, list) or not templates:
            errors.append(f"{group}: must be a list of prompts, each behind a dash")
        else:
            yield from ((group, entry) for template in templates if (entry := _entry(group, template, errors)))


def _entry(group: str, template: Any, errors: list[str]) -> Mapping[str, str] | None:
    entry = {"prompt": template} if isinstance(template, str) else template
    if not isinstance(entry, dict) or "prompt" not in entry or not all(map(_is_text, entry.values())):
        errors.append(
            f"{group}: {shown(_meant(template))} is no prompt; write a text, in quotes where YAML takes it for a "
            f"number, yes or no, with at most {_LONGEST} characters, or {{prompt: TEXT, plain: TEXT}}"
        )
        return None
    unknown = [str(key) for key in entry if key not in _KEYS]
    if unknown:
        errors.append(
            f"{group}: {shown(entry['prompt'])!r} has the unknown key {shown(unknown[0])}"
            f"{suggestion(unknown[0], _KEYS)}"
        )
        return None
    return entry


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(value, "meaning", value), str) and len(value) <= _LONGEST


def _meant(value: Any) -> str:
    return repr(getattr(value, "meaning", value))


def _placeholder_errors(template: str, values: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with the placeholders of a text."""
    errors = []
    for braces in islice((one[0] for one in _ANY_BRACES.finditer(template) if one["text"] is None), _MOST_ERRORS):
        match = _PLACEHOLDER.fullmatch(braces)
        if not match:
            errors.append(
                f"{shown(template)!r}: {shown(braces)} is no placeholder; known are {{trigger}}, {{class}}, "
                "{trigger2}, ..."
            )
        elif match[1] + match[2] not in values:
            which = f"the {match[2]}. --{match[1]}" if match[2] else f"--{match[1]}"
            errors.append(f"its prompts need {{{match[1]}{match[2]}}}: give {which}, say {_EXAMPLES[match[1]]}")
    return errors


_EXAMPLES = {"trigger": '--trigger "blob style"', "class": "--class dog"}


def _case(index: int, group: str, texts: Mapping[str, str], values: Mapping[str, str], suite: str) -> Case:
    prompt = _filled(texts["prompt"], values)
    control = _filled(texts["plain"], values) if "plain" in texts else _without_triggers(texts["prompt"], values)
    caption = _filled(texts["meaning"], values) if "meaning" in texts else control
    return Case(index, prompt, control, caption, group, suite)


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = _PLACEHOLDER.sub(lambda match: values[match[1] + match[2]], template)
    return _with_articles(text, [values[match[1] + match[2]] for match in _PLACEHOLDER.finditer(template)])


def _without_triggers(template: str, values: Mapping[str, str]) -> str:
    marked = {name: "\x01" + "t" if name.startswith("trigger") else word for name, word in values.items()}
    text = _PLACEHOLDER.sub(lambda match: marked[match[1] + match[2]], template)
    text = without_trigger(text, phrase_pattern("\x01t"))
    return _with_articles(text, [values[match[1] + match[2]] for match in _PLACEHOLDER.finditer(template)])


def _with_articles(text: str, words: Sequence[str]) -> str:
    """Puts the right one of a and an before these words."""
    for word in filter(None, words):
        article = r"\1n" if word[0].lower() in "aeiou" else r"\1"
        text = re.sub(_ARTICLE.format(word=re.escape(word)), article, text)
    return text
