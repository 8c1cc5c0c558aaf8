"""`lora-diffusion select`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs
from lora_diffusion.core.errors import ConfigError

_LIMITS = {
    "max_copying": "likeness to the nearest training image; default: what the references score",
    "max_prior_drift": "change of images without the trigger; default: half of the way to another base image",
    "max_prompt_leak": "likeness that shows unasked; default: half of the way from the base to real images",
}


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("select", help="choose the best checkpoint and weight of a run")
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--evaluation", type=Path, metavar="DIR", help="take this evaluation of its checkpoints")
    for name, meaning in _LIMITS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="X", help=meaning)
    parser.add_argument("--likeness", metavar="METRIC", help="dino_image or clip_image; default: the first there is")
    parser.add_argument(
        "--text-weight", type=float, default=0.5, metavar="X", help="0: only likeness counts, 1: only the text (0.5)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="evaluate.key=value", help="how to evaluate, say evaluate.references=DIR"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if not 0 <= args.text_weight <= 1:
        raise ConfigError(f"--text-weight {args.text_weight:g}: must be between 0 and 1.")
    for name in _LIMITS:
        value = getattr(args, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be a finite number.")
    for text in args.overrides:
        if not text.startswith("evaluate."):
            raise ConfigError(
                f"{text}: only evaluate.key=value changes how the run is evaluated; its training is done."
            )
    set_up_logs(args)
    from lora_diffusion.workflows.select import Preference, select

    bounds = {name.removeprefix("max_"): getattr(args, name) for name in _LIMITS}
    preference = Preference(**bounds, likeness=args.likeness, text_weight=args.text_weight)
    selection = select(args.path, args.evaluation, preference, args.overrides)
    print_result(args, selection)
