"""`lora-diffusion quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("quickstart", help="train, draw and score a style on the built-in base, in minutes")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="run folder (quickstart)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.quickstart import quickstart

    result = quickstart(args.output, overwrite=args.overwrite)
    print_result(args, result.to_json(), result.text())
