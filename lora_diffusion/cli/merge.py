"""`lora-diffusion merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_family, print_result, set_up_logs, weighted_parts


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("merge", help="write a base model with adapters in it")
    parser.add_argument(
        "--model", required=True, help="builtin:emoji, a diffusers folder, a .safetensors checkpoint or a hub id"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        required=True,
        metavar="FILE:WEIGHT",
        help="one weight, or one for each part (FILE:unet=0.8,text_encoder=0); may be given several times",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder, or file if the base is one file")
    parser.add_argument(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="dtype of the networks' weights; default: as stored in the base, as all else in it stays",
    )
    add_family(parser, "what its files tell")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    adapters = [weighted_parts(text) for text in args.adapter]
    set_up_logs(args)
    from lora_diffusion.workflows.bases import find_weights
    from lora_diffusion.workflows.merge import merge

    model = find_weights(args.model, args.family)
    result = merge(model, adapters, args.output, dtype=args.dtype or "auto", overwrite=args.overwrite)
    print_result(args, result)
