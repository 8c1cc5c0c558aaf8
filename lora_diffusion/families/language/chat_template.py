"""Chat templates are programs of strangers: they are rendered in jinja2's sandbox, in bounded time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
_TOO_MUCH = "it takes more than 3 seconds or 400 MB"


class ChatTemplate:
    """A template, and the process that renders it; the process ends with this one."""

    def __init__(self, template: str) -> None:
        """Starts the process, which compiles the template; what is wrong with it, `render` tells."""
        # In a session of its own, so that Ctrl-C at the terminal is told of once; stdin ends when we do.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            start_new_session=True,
        )
        self._error = ""
        try:
            self._ask(template)
        except ValueError as error:
            self._error = str(error)

    def render(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, Any], *, ask: bool) -> str:
        """Returns a conversation as transformers' `apply_chat_template` writes it.

        Args:
            messages: with role and content each, of plain values.
            special_tokens: name -> token, of the tokenizer.
            ask: end with what calls for an answer.

        Raises:
            ValueError: the template refuses the messages, fails, or takes too much; then it is not tried again.
        """
        chat = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": ask}
        return self._ask({**chat, **special_tokens})

    def _ask(self, question: Any) -> str:
        if self._error:
            raise ValueError(self._error)
        assert self._process.stdin, "it was started with pipes"
        assert self._process.stdout, "it was started with pipes"
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._error = _TOO_MUCH
            raise ValueError(self._error)
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])


@cache
def chat_template(template: str) -> ChatTemplate:
    """Returns a template, whose process is started once."""
    return ChatTemplate(template)
