"""`lora-diffusion extract`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_family, add_rank, print_result, set_up_logs
from lora_diffusion.core import registry


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("extract", help="write the difference of two base models as an adapter")
    parser.add_argument("base", metavar="BASE", help="model that the adapter is for: folder, checkpoint or hub id")
    parser.add_argument("tuned", metavar="TUNED", help="fine-tuned model of the same family")
    parser.add_argument("output", type=Path, metavar="OUT", help="file, or folder for peft")
    add_rank(parser, required=True)
    parser.add_argument("--parts", nargs="+", default=[], help="networks to look at, say unet; default: all")
    parser.add_argument("--targets", nargs="+", default=[], help="modules, as adapter.targets; default: all groups")
    parser.add_argument("--to", choices=registry.available("formats"), default="kohya", help="spelling (kohya)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp16", help="number type (fp16)")
    add_family(parser, "what its files tell")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.workflows.bases import find_weights
    from lora_diffusion.workflows.extract import extract

    result = extract(
        find_weights(args.base, args.family),
        find_weights(args.tuned, args.family),
        args.output,
        rank=args.rank,
        energy=args.energy,
        parts=args.parts,
        targets=args.targets,
        format_name=args.to,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print_result(args, result)
