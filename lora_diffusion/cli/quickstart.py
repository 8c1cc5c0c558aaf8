"""`lora-diffusion quickstart`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs
from lora_diffusion.quickstart import NAMES, quickstart


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("quickstart", help="train and score an adapter on a built-in base, in minutes")
    parser.add_argument("what", nargs="?", choices=NAMES, default=NAMES[0], help=f"what to show ({NAMES[0]})")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="run folder (quickstart)")
    parser.add_argument("--resume", action="store_true", help="continue a quickstart that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    result = quickstart(args.what, args.output, resume=args.resume, overwrite=args.overwrite)
    print_result(args, result)
