"""`lora-diffusion train`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_config, config_and_overrides, print_result, set_up_logs
from lora_diffusion.core.result import Result


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train an adapter from a folder of images")
    add_config(parser, "data.path=photos train.max_steps=500")
    parser.add_argument("--resume", action="store_true", help="continue the run in output.path where it stopped")
    parser.add_argument("--dry-run", action="store_true", help="show data, plan and memory; train nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output.path")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    config = load(*config_and_overrides(args))
    set_up_logs(args)
    workflow: Callable[..., Result]
    if args.dry_run:
        from lora_diffusion.workflows.estimate import dry_run as workflow
    else:
        from lora_diffusion.workflows.train import train as workflow

    print_result(args, workflow(config, resume=args.resume, overwrite=args.overwrite))
