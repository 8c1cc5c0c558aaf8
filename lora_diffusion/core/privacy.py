"""What may be told to everybody: names, but not where they lie on this machine, which names its user too."""

from __future__ import annotations

import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

_ABSOLUTE = re.compile(r"(~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\|/)")
_PART = r"""[/\\]+[^\s/\\"'`<>|,;:()\[\]{}]+"""
_IN_TEXT = re.compile(
    # Not inside of a word, a relative path or an address; a single "/s" without home or drive is a word, too.
    rf"""(?<![\w.:/\\~-])(?:file://(?=/))?(?:(?:~[\w.-]*|[A-Za-z]:)(?:{_PART})+|(?:{_PART}){{2,}})[/\\]*"""
)
_HOMES = ("home", "Users")
"""Folders whose folders are called as users are."""


def public_path(name: str) -> str:
    """Returns a path, hub id or other name of a base as it may be published: of an absolute path the last part.

    >>> public_path("/home/maria/bases/my base"), public_path("owner/base"), public_path("builtin:emoji")
    ('my base', 'owner/base', 'builtin:emoji')
    """
    if not _ABSOLUTE.match(name) and ".." not in Path(name).parts:
        return name
    path = PureWindowsPath(name.rstrip("/\\"))
    is_home = path.parent.name in _HOMES or path.name in ("", "~", "..") or name.rstrip("/\\") == _home()
    return "a folder" if is_home else path.name


def public_text(text: str) -> str:
    r"""Returns a text in which of each absolute path only the last part is left.

    >>> public_text("scored by dino=/home/maria/dino and C:\\Users\\maria\\clip, see https://x.org/a/b")
    'scored by dino=dino and clip, see https://x.org/a/b'
    """
    if _ABSOLUTE.match(text) and _exists(text):
        return public_path(text)
    return _IN_TEXT.sub(lambda match: public_path(match[0].removeprefix("file://")), text)


def public(value: Any) -> Any:
    """Returns JSON values whose texts, keys included, went through `public_text`."""
    if isinstance(value, dict):
        return {public(key): public(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return public_text(value) if isinstance(value, str) else value


def _home() -> str:
    return os.path.expanduser("~")  # noqa: PTH111, which stays as it is where there is no home


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False
