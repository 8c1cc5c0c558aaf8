"""`lora-diffusion compose`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_embeddings, add_rank, print_result, set_up_logs, weighted_parts
from lora_diffusion.core import registry


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("compose", help="add adapters up into one file")
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="FILE:WEIGHT",
        help="adapter with one weight (a.safetensors:0.8) or one for each part (a.safetensors:unet=0.8,text_encoder=0)",
    )
    parser.add_argument("--output", type=Path, required=True, help="file, in kohya's format")
    parser.add_argument("--method", choices=registry.available("methods"), default="sum", help="how; default: sum")
    add_rank(parser, required=False)
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="dtype; default: that of the adapters")
    parser.add_argument("--model", help="the base itself, if it is built unlike those that were published")
    add_embeddings(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    adapters = [weighted_parts(text) for text in args.adapters]
    set_up_logs(args)
    from lora_diffusion.workflows.compose import compose

    result = compose(
        adapters,
        args.output,
        method=args.method,
        rank=args.rank,
        energy=args.energy,
        dtype=args.dtype or "auto",
        model_path=args.model,
        embeddings=args.embeddings,
        overwrite=args.overwrite,
    )
    print_result(args, result)
