"""Entry point `lora-diffusion`: finds the command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from lora_diffusion.cli import (
    ask,
    compose,
    config,
    convert,
    data,
    estimate,
    evaluate,
    export,
    extract,
    generate,
    inspect,
    merge,
    metadata,
    push,
    quickstart,
    report,
    resize,
    select,
    train,
    transcribe,
    verify,
)
from lora_diffusion.core import launch
from lora_diffusion.core.errors import ConfigError, LoraDiffusionError
from lora_diffusion.core.logs import log_warnings, silence
from lora_diffusion.core.text import printable, shown
from lora_diffusion.core.version import __version__

_COMMANDS = (
    quickstart,
    train,
    estimate,
    generate,
    transcribe,
    ask,
    data,
    evaluate,
    select,
    report,
    export,
    convert,
    inspect,
    verify,
    resize,
    compose,
    merge,
    extract,
    metadata,
    push,
    config,
)

_SHARED_WORK = ("train", "evaluate", "select")
"""Commands that several processes do together."""
_WITHOUT_TRAINING = ("generate", "evaluate", "select", "transcribe", "ask")
"""Commands that compute with a base and train nothing."""
_AFTER_EQUALS = re.compile(r"^(--[\w-]+=)~(?=/|$)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _at_home(match: re.Match[str]) -> str:
    return match[1] + os.path.expanduser("~")  # noqa: PTH111 - that of pathlib raises where there is no home


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all commands."""
    parser = _Parser(
        prog="lora-diffusion",
        description="Train small adapter files for image models, look at what they generate, and use them everywhere.",
        epilog="New here? Run: lora-diffusion quickstart",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    for subparser in commands.choices.values():
        subparser.add_argument("--json", action="store_true", help="print the result as JSON")
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _option_hint(arguments: Sequence[str]) -> str:
    """Returns what options of other trainers are called here."""
    from lora_diffusion.config.importers.other_trainers import KEYS

    names = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    hints = [f"{name}: {KEYS[key]}" for name in names if (key := name.lstrip("-").replace("-", "_").lower()) in KEYS]
    return f"; settings are given as key=value ({'; '.join(hints)})" if hints else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; overrides may stand before, between and behind options, which argparse cannot do."""
    parser = build_parser()
    given = sys.argv[1:] if arguments is None else arguments
    # Shells expand ~ at the start of a word only, which it is not in --output=~/pictures.
    args, rest = parser.parse_known_args([_AFTER_EQUALS.sub(_at_home, text) for text in given])
    if any(argument.startswith("-") for argument in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_option_hint(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _check_processes(command: str) -> None:
    if command in (*_SHARED_WORK, *_WITHOUT_TRAINING):
        launch.check()  # now, since all that they import takes seconds
    if command not in _SHARED_WORK and launch.num_processes() > 1:
        raise ConfigError(
            f"{launch.num_processes()} processes were started, and {command} is done by one; run it without "
            "'accelerate launch', or with --num_processes 1."
        )


def _tell_unused_precision(command: str) -> None:
    precision = launch.launcher_precision()
    if precision and command in _WITHOUT_TRAINING and launch.process_index() == 0:
        message = f"accelerate's mixed precision ({precision}) is that of training; {command} computes in model.dtype"
        print(f"lora-diffusion {command}: {message}.", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done, 1 the run failed, 2 bad input or config.
    """
    args = _parse(arguments)
    try:
        _check_processes(args.command)
        _tell_unused_precision(args.command)
        with warnings.catch_warnings():
            log_warnings()
            args.run(args)
        _flush()
    except LoraDiffusionError as error:
        if args.debug:
            raise
        # The main process tells the rest.
        _tell(args, str(error) if launch.process_index() == 0 else str(error).partition("\n")[0])
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, say head, has enough
        silence(sys.stdout)
    except (MemoryError, OSError, RuntimeError) as error:
        message = None if args.debug else _failure(error)
        if message is None:
            raise
        _tell(args, message)
        return 1
    except KeyboardInterrupt:
        instead = " instead of --overwrite" if getattr(args, "overwrite", False) else ""
        advice = f"; give the same command with --resume{instead} to continue" if hasattr(args, "resume") else ""
        print(file=sys.stderr)
        _tell(args, f"stopped{advice}.")
        return 1
    return 0


def _failure(error: Exception) -> str | None:
    """Returns what to tell of a failure that is none of the program; None for all others."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({str(error) or 'no more can be had'}); close other programs or take less."
    if isinstance(error, OSError):
        return f"{error}; is the disk full or a folder gone?"
    if not launch.is_lost_process(error):
        return None
    place = f"process {launch.process_index() + 1} of {launch.num_processes()}"
    return f"{place} stopped, since another one ended ({shown(str(error).strip().partition(chr(10))[0], 200)})."


def _flush() -> None:
    if sys.stdout is None:  # closed, as daemons have it
        return
    try:
        sys.stdout.flush()
    except OSError:
        silence(sys.stdout)  # Python would flush again at the end, and say so with a traceback
        raise


def _tell(args: argparse.Namespace, message: str) -> None:
    try:
        print(printable(f"lora-diffusion {args.command}: {message}"), file=sys.stderr)
    except BrokenPipeError:
        silence(sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
