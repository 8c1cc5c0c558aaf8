"""`lora-diffusion estimate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("estimate", help="predict how much memory a training run needs")
    parser.add_argument("--config", type=Path, help="YAML file, or a name of 'config list'")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="say model.quantization=nf4")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    config = load(args.config, args.overrides)
    set_up_logs(args)
    from lora_diffusion import workflows

    estimate = workflows.estimate(config)
    print_result(args, estimate.to_json(), estimate.text())
