"""Entry point `lora-diffusion`: finds the command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lora_diffusion import __version__
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
from lora_diffusion.core.errors import LoraDiffusionError

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

_AFTER_EQUALS = re.compile(r"^(--[\w-]+=)~(?=/|$)")


def _at_home(match: re.Match[str]) -> str:
    return f"{match[1]}{Path.home()}"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="lora-diffusion",
        description="Train small adapter files for image models, look at what they draw, and use them everywhere.",
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
    from lora_diffusion.config.other_trainers import KEYS

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0 done, 1 the run failed, 2 bad input or config.
    """
    args = _parse(arguments)
    try:
        args.run(args)
        sys.stdout.flush()
    except LoraDiffusionError as error:
        if args.debug:
            raise
        print(f"lora-diffusion {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, say head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if args.debug:
            raise
        print(f"lora-diffusion {args.command}: {error}; is the disk full or a folder gone?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        instead = " instead of --overwrite" if getattr(args, "overwrite", False) else ""
        advice = f"; give the same command with --resume{instead} to continue" if hasattr(args, "resume") else ""
        print(f"\nlora-diffusion {args.command}: stopped{advice}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
