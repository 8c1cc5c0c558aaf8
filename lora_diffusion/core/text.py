"""Texts of strangers in messages: made printable, shortened, and the known word that was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


_LONGEST = 200


def suggestion(word: str, known: Iterable[str]) -> str:
    """Returns ' (did you mean "a" or "b"?)', or nothing where no known word is close."""
    by_small = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word[:_LONGEST].lower(), list(by_small), n=3, cutoff=0.6)
    return question(by_small[name] for name in close)


def question(words: Iterable[str]) -> str:
    """Returns ' (did you mean "a" or "b"?)', or nothing without words."""
    quoted = " or ".join(f'"{word}"' for word in words)
    return f" (did you mean {quoted}?)" if quoted else ""


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves the cursor, turns the direction of what follows, or cannot be encoded; tabs and line breaks may stay."""


def name_some(names: list[str], limit: int = 3) -> str:
    """Returns the first names and how many more there are: "a, b, c and 4 more"."""
    first = ", ".join(names[:limit])
    return first if len(names) <= limit else f"{first} and {len(names) - limit} more"


def shown(text: str, limit: int = 100) -> str:
    r"""Returns a stranger's text as a terminal may print it: in one line, without control characters, shortened.

    >>> print(shown("red\x1b[2J and more", limit=7))
    red\x1b[2J... (16 characters)
    """
    short = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in short)


def printable(text: str) -> str:
    r"""Returns text of several lines as a terminal may print it, with control characters and halves of others escaped.

    >>> print(printable("a cat\x1b[2J\nand \x9b1m"))
    a cat\x1b[2J
    and \x9b1m
    """
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text)


def printable_json(text: str) -> str:
    r"""Returns JSON that means the same, with the characters that `printable` escapes as JSON escapes them.

    >>> print(printable_json('"a\x9b"'))
    "a\u009b"
    """
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
