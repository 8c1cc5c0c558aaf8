"""YAML of strangers: texts, lists and mappings, and nothing that is looked up, computed or run.

Scalars stay as they are written, so that whoever knows what a key means decides what 007, 1e-3 or no stand for. What a
file may cost is bounded: its size, the number of its values once all aliases are written out, and how deep they nest.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diffusion.core.text import shown

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 1 << 20
"""Of a file: thousands of prompts, and a hundred times the longest config."""
MAX_VALUES = 50_000
"""With each alias counted as often as it is used, so that ten lines cannot stand for a billion."""
MAX_DEPTH = 20
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_TRUTHS = {
    **dict.fromkeys(("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"), True),
    **dict.fromkeys(("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"), False),
}
_WHOLE = re.compile(r"[-+]?(0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+|[0-9][0-9_]*)")
_NUMBER = re.compile(
    r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_LONGEST_NUMBER = 100
_PLAIN_TAGS = ("null", "bool", "int", "float", "timestamp", "str", "value")


class Plain(str):
    """A scalar without quotes, as it is written."""

    @property
    def meaning(self) -> bool | int | float | str | None:
        """Returns what YAML takes it for: null, true or false, a number, else the text itself.

        Zeros in front do not make a number octal, nor colons one of base 60, as nobody means that.

        >>> Plain("1e-3").meaning, Plain("010").meaning, Plain("~").meaning, Plain("1:30").meaning
        (0.001, 10, None, '1:30')
        """
        if self in _NULLS:
            return None
        if self in _TRUTHS:
            return _TRUTHS[self]
        if len(self) <= _LONGEST_NUMBER and _WHOLE.fullmatch(self):
            digits = self.replace("_", "").lower()
            base = {"0x": 16, "0o": 8, "0b": 2}.get(digits.lstrip("+-")[:2], 10)
            return int(digits, base)
        if len(self) <= _LONGEST_NUMBER and _NUMBER.fullmatch(self):
            return float(self.replace("_", "").replace(".inf", "inf").replace(".nan", "nan").lower())
        return str(self)


class YamlError(ValueError):
    """It is not such YAML; says why in one line."""


def read_text(path: Path) -> str:
    """Returns the text of a file.

    Raises:
        YamlError: it is too large, or no UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        content = stream.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlError(f"it is larger than {MAX_BYTES >> 20} MB, as no such file is")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise YamlError("it is UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise YamlError("it is no text, since it holds zero bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlError(f"line {line} is not UTF-8; save it as UTF-8") from error


def parse(text: str) -> Any:
    """Returns what a text holds: dicts, lists, and texts, which are `Plain` where no quotes stand around them.

    Raises:
        YamlError: it is no YAML, or too much of it, or it refers to other values too often.
    """
    import yaml

    loader = _loader()
    try:
        _check_size(text, loader)
        return yaml.load(text, Loader=loader)  # noqa: S506 - it makes texts, lists and mappings only
    except yaml.MarkedYAMLError as error:
        raise YamlError(_explained(error, text)) from error
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", None) or error
        raise YamlError(shown(" ".join(str(reason).split()), 200)) from error
    except UnicodeEncodeError as error:
        raise YamlError("it holds half a character, which is no text") from error


def _explained(error: yaml.MarkedYAMLError, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem)
    if problem.startswith("but "):
        problem = f"{error.context}, {problem}"
    if mark is None:
        return shown(problem, 200)
    # C's marks count bytes, Python's characters; the line is right in both.
    lines = text.split("\n")
    line = lines[min(mark.line, len(lines) - 1)]
    hint = "; indent with spaces, not tabs" if "cannot start any token" in problem and "\t" in line else ""
    return f"line {mark.line + 1}: {shown(problem, 200)}{hint}"


def _check_size(text: str, loader: Any) -> None:
    """Counts values before any is made; an alias counts as much as what it stands for."""
    import yaml

    sizes: dict[str, int] = {}
    open_: list[list[Any]] = [[None, 0]]
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            open_[-1][1] += _size_of(event, sizes, open_)
        elif isinstance(event, yaml.ScalarEvent):
            open_[-1][1] += 1
            sizes.update({event.anchor: 1} if event.anchor else {})
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            open_[-1][1] += size
            sizes.update({anchor: size} if anchor else {})
        if len(open_) > MAX_DEPTH + 1:
            raise YamlError(f"line {_line(event.start_mark)}: values are nested more than {MAX_DEPTH} deep")
        if sum(size for _, size in open_) > MAX_VALUES:
            line = _line(event.start_mark)
            raise YamlError(f"line {line}: it holds more than {MAX_VALUES} values, aliases written out")


def _line(mark: Any) -> int:
    return int(mark.line) + 1


def _size_of(alias: Any, sizes: dict[str, int], open_: list[list[Any]]) -> int:
    if any(anchor == alias.anchor for anchor, _ in open_):
        raise YamlError(f"line {_line(alias.start_mark)}: *{shown(alias.anchor)} stands for itself")
    # An alias without anchor is told of when the values are made.
    return sizes.get(alias.anchor, 1)


@cache
def _loader() -> Any:
    """Returns a loader of PyYAML that makes texts of all scalars, and nothing of other tags."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc]
        yaml_constructors: dict[Any, Any] = {}  # noqa: RUF012 - of PyYAML; those of the base are left out

    for tag in _PLAIN_TAGS:
        Loader.add_constructor(f"tag:yaml.org,2002:{tag}", _scalar)
    Loader.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
    Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
    Loader.add_constructor(None, _refuse)
    return Loader


def _scalar(loader: Any, node: yaml.ScalarNode) -> str:
    value: str = loader.construct_scalar(node)
    return value if node.style else Plain(value)


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Hashable, Any]:
    """Makes a dict; a key that stands twice is an error, one that `<<` brings gives way."""
    import yaml

    keys = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a text", key.start_mark)
        if key.value in keys:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands there twice", key.start_mark)
        keys.add(key.value)
    mapping: dict[Hashable, Any] = loader.construct_mapping(node, deep=True)
    return mapping


def _refuse(loader: Any, node: yaml.Node) -> Any:
    import yaml

    del loader
    raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag} is not read", node.start_mark)
