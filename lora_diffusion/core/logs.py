"""What the user reads while a command works: on stderr, since stdout carries the result."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

from lora_diffusion.core.launch import process_index

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("lora_diffusion")


@cache
def console() -> Console:
    """Returns the console on stderr that logs, progress bars and tables share; only the main process shows them."""
    from rich.console import Console

    return Console(stderr=True, quiet=process_index() > 0)


def set_up(debug: bool = False) -> None:
    """Sends our log records to the console; warnings of libraries stay as they are, but for one."""
    from rich.logging import RichHandler

    logger.handlers = [RichHandler(console=console(), show_time=False, show_path=debug, markup=False)]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    # On some processors it asks for a package whose only use is an order of weights that we keep off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def name_some(names: list[str], limit: int = 3) -> str:
    """Returns the first names and how many more there are: "a, b, c and 4 more"."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def shown(text: str, limit: int = 100) -> str:
    r"""Returns a stranger's text as a terminal may print it: in one line, without control characters, shortened.

    >>> print(shown("red\x1b[2J and more", limit=7))
    red\x1b[2J... (16 characters)
    """
    short = text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in short)
