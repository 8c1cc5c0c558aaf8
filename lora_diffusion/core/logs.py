"""What the user reads while a command works: on stderr, since stdout carries the result."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, TextIO

from lora_diffusion.core.launch import process_index
from lora_diffusion.core.text import printable

if TYPE_CHECKING:
    from rich.console import Console


logger = logging.getLogger("lora_diffusion")


@cache
def console() -> Console:
    """Returns the console on stderr that logs, progress bars and tables share; only the main process shows them."""
    from rich.console import Console

    class _Console(Console):
        def on_broken_pipe(self) -> None:
            """Goes on without a reader; the work is not done for the log."""
            self.quiet = True
            silence(sys.stderr)

    return _Console(stderr=True, quiet=process_index() > 0)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up(debug: bool = False) -> None:
    """Sends our log records to the console; log records of libraries stay as they are, but for two."""
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    # Its usual search for what to colour takes a minute for a name or caption of 30,000 letters.
    plain = NullHighlighter()
    handler = RichHandler(console=console(), show_time=False, show_path=debug, markup=False, highlighter=plain)
    handler.setFormatter(_Printable("%(message)s"))
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    # On some processors it asks for a package whose only use is an order of weights that we keep off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # It tells of damaged images what our own errors tell.
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Without a home folder it tells where it keeps its fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def log_warnings() -> None:
    """Sends Python warnings, with which libraries speak to programmers, to the log, where --debug shows them.

    What they say of CUDA is a warning to the user too. Call it within `warnings.catch_warnings`, which takes it back.
    """

    def log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del file, line
        if "CUDA" in str(message):
            logger.warning("%s", " ".join(str(message).split()))
        else:
            logger.debug("%s:%d: %s: %s", filename, lineno, category.__name__, message)

    warnings.showwarning = log


def silence(stream: TextIO) -> None:
    """Lets a stream that nobody reads any more write into nothing, so that flushing it is no error."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)
