"""`lora-diffusion export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs
from lora_diffusion.core import registry


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("export", help="write the adapter of a run in another format")
    parser.add_argument(
        "run_path", type=Path, metavar="RUN_DIR", help="folder of a training run, or a checkpoint in it"
    )
    parser.add_argument("--step", type=int, help="the checkpoint after this step instead of the finished adapter")
    parser.add_argument("--to", required=True, choices=registry.available("formats"), help="format of the file")
    parser.add_argument("--output", type=Path, required=True, help="file, or folder for peft")
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        help="must apply all of it: comfyui, a1111, forge, kohya or diffusers; default: those it is meant for",
    )
    parser.add_argument("--card", action="store_true", help="write a model card, README.md, beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.workflows.export import export

    result = export(
        args.run_path,
        args.to,
        args.output,
        step=args.step,
        apps=args.client,
        card=args.card,
        overwrite=args.overwrite,
    )
    print_result(args, result)
