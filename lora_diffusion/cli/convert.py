"""`lora-diffusion convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_embeddings, add_family, print_result, set_up_logs
from lora_diffusion.core import registry


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("convert", help="write an adapter file in another format")
    parser.add_argument(
        "input", type=Path, metavar="IN", help="adapter file, folder saved by PEFT, or checkpoint of a run"
    )
    parser.add_argument("output", type=Path, metavar="OUT", help="file, or folder for peft")
    parser.add_argument(
        "--to",
        required=True,
        choices=[*registry.available("formats"), "comfyui", "a1111", "forge"],
        help="format; comfyui, a1111 and forge read that of kohya",
    )
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="dtype; default: that of IN")
    add_family(parser, "what the tensors tell")
    parser.add_argument("--model", help="the base itself, if it is built unlike those that were published")
    parser.add_argument(
        "--from-pickle",
        action="store_true",
        help="take the tensors out of a .pt or .bin file, also in a folder",
    )
    add_embeddings(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    set_up_logs(args)
    from lora_diffusion.workflows.convert import convert

    result = convert(
        args.input,
        args.output,
        args.to,
        dtype=args.dtype or "auto",
        model_path=args.model,
        family_name=args.family,
        is_pickle=args.from_pickle,
        embeddings=args.embeddings,
        overwrite=args.overwrite,
    )
    print_result(args, result)
