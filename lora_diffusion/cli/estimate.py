"""`lora-diffusion estimate`."""

from __future__ import annotations

import argparse
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_config, config_and_overrides, print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("estimate", help="predict how much memory a training run needs")
    add_config(parser, "model.quantization=nf4")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    config = load(*config_and_overrides(args), unused=("data.path", "output.path"))
    set_up_logs(args)
    from lora_diffusion.workflows.estimate import estimate

    result = estimate(config)
    print_result(args, result)
