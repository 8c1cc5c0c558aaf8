"""`lora-diffusion report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("report", help="show a run or an evaluation on a page, or compare several")
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_OR_EVALUATION", help="folder; several are compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="page (report.html in the folder; of several comparison.html here)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.workflows.report import report

    print_result(args, report(args.paths, args.output))
