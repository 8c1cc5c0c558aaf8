"""Renders a chat template in a process of its own, whose time and memory are bounded; `_chat_template` starts it.

Reads lines of JSON from stdin, first the template, then the variables of each rendering, and answers each with a line.
It imports nothing of ours, so that it starts in a tenth of a second.

Source: names and filters are those of transformers, `utils/chat_template_utils.py`.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 3
"""Of processor time for one rendering, which takes about a thousandth."""
BYTES = 400 << 20
"""Of address space, most of which Python itself takes."""
LONGEST = 1 << 22
"""Characters of a rendered conversation."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark answers; they are rendered like all else."""

    tags = {"generation"}  # noqa: RUF012 - so in jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Reads up to the end of the block, whose names are its own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with "_", which could lead out of the sandbox."""

    def __init__(*args: Any, **options: Any) -> None:
        namespace, *rest = args
        for name in (values := dict(*rest, **options)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(namespace, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda text: datetime.now().strftime(text),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time(seconds: float) -> None:
    import signal

    if hasattr(signal, "setitimer"):
        # Without a handler of ours the signal ends the process, even within one long operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)


def main() -> None:
    """Answers until stdin ends."""
    _limit_memory()
    template: jinja2.Template | None = None
    for line in sys.stdin:
        _limit_time(SECONDS)
        try:
            if template is None:
                template, text = _compile(json.loads(line)), ""
            else:
                text = template.render(**json.loads(line))
            answer = {"text": text} if len(text) <= LONGEST else {"error": "it writes too much"}
        except Exception as error:  # noqa: BLE001 - the template of a stranger may raise anything
            answer = {"error": " ".join(str(error).split())[:500] or type(error).__name__}
        print(json.dumps(answer), flush=True)
        _limit_time(0)


if __name__ == "__main__":
    main()
