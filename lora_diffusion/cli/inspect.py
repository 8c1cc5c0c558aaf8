"""`lora-diffusion inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("inspect", help="say what an adapter file is and what is wrong with it")
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="adapter file, folder saved by PEFT, or checkpoint of a run"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.workflows.inspect import inspect

    report = inspect(args.path)
    print_result(args, report)
