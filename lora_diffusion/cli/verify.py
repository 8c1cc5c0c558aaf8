"""`lora-diffusion verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs
from lora_diffusion.core.errors import VerificationError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("verify", help="say what ComfyUI and others would lose or misread of an adapter file")
    parser.add_argument(
        "path", type=Path, metavar="FILE", help="adapter file, folder saved by PEFT, or checkpoint of a run"
    )
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        help="comfyui, a1111, forge, kohya or diffusers; may be given several times; default: all",
    )
    parser.add_argument("--base", help="sd1, sd2, sdxl or a base model; default: as the file says")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.workflows.verify import verify

    if args.base:
        set_up_logs(args)
    verification = verify(args.path, args.client, args.base)
    print_result(args, verification)
    if not verification.is_sound:
        bad = [result.title for result in verification.results if not result.is_sound]
        raise VerificationError(f"{args.path} would not work as it is meant in {', '.join(bad)}.")
