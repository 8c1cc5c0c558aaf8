"""`lora-diffusion generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import base_of, print_result, set_up_logs, size
from lora_diffusion.compose.plan import weighted_file
from lora_diffusion.config.rules import check_generation


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("generate", help="generate images, with adapters at chosen weights")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="builtin:emoji, a diffusers folder, a .safetensors checkpoint or a hub id")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE:WEIGHT", help="may be given several times"
    )
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--negative", default="", help="what the images should not show")
    parser.add_argument("--seed", action="append", type=int, help="may be given several times; default 0")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt (by the base); 1 = off")
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels; default: what the base was trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder for the images and grid.png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    check_generation(args.prompt, args.seed or (), args.negative, args.steps, args.guidance)
    configured = base_of(args)
    adapters = [weighted_file(text) for text in args.adapter]
    set_up_logs(args)
    from lora_diffusion.workflows.bases import find_model
    from lora_diffusion.workflows.generate import generate

    result = generate(
        configured or find_model(args.model),
        prompts=args.prompt,
        seeds=args.seed or [0],
        adapters=adapters,
        negative=args.negative,
        num_steps=args.steps,
        guidance=args.guidance,
        size=args.size,
        output_path=args.output,
    )
    print_result(args, result)
