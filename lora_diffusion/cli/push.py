"""`lora-diffusion push`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("push", help="upload an adapter with its model card to the Hugging Face hub")
    parser.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="run folder, adapter file or PEFT folder")
    parser.add_argument("--repo", required=True, metavar="USER/NAME", help="repository; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make it visible to you only")
    parser.add_argument("--dry-run", action="store_true", help="show files and card; upload nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.workflows.push import push

    publication = push(args.source, args.repo, private=args.private, dry_run=args.dry_run)
    print_result(args, publication)
