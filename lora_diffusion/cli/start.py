"""The program's first lines. Nothing else is imported before them, so that Ctrl-C finds them ready at once."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns as `lora_diffusion.cli.main.main`."""
    try:
        _open_streams()
        from lora_diffusion.cli.main import main as run

        return run(arguments)
    except KeyboardInterrupt:
        print("\nlora-diffusion: stopped.", file=sys.stderr)
        return 1
    finally:
        _flush()


def _open_streams() -> None:
    """Opens those of stdin, stdout and stderr that are closed on nothing, before another file takes their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))
    if hasattr(sys.stdout, "reconfigure"):  # where the locale has no such character
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Leaves nothing for Python to flush into a pipe that nobody reads, which it would tell in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
