"""`lora-diffusion resize`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_embeddings, add_rank, print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("resize", help="write an adapter at a smaller rank")
    parser.add_argument("input", type=Path, metavar="IN", help="adapter file, or folder saved by PEFT")
    parser.add_argument("output", type=Path, metavar="OUT", help="file, or folder for peft")
    add_rank(parser, required=True)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="dtype; default: that of IN")
    parser.add_argument("--model", help="the base itself, if it is built unlike those that were published")
    add_embeddings(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.workflows.resize import resize

    result = resize(
        args.input,
        args.output,
        rank=args.rank,
        energy=args.energy,
        dtype=args.dtype or "auto",
        model_path=args.model,
        embeddings=args.embeddings,
        overwrite=args.overwrite,
    )
    print_result(args, result)
