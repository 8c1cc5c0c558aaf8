"""`lora-diffusion train`."""

from __future__ import annotations

import argparse
from typing import Any

from lora_diffusion.cli._shared import add_config, config_and_overrides, print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train an adapter from a folder of pictures")
    add_config(parser, "data.path=photos train.max_steps=500")
    parser.add_argument("--resume", action="store_true", help="continue the run in output.path where it stopped")
    parser.add_argument("--dry-run", action="store_true", help="show data, plan and memory; train nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output.path")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    config = load(*config_and_overrides(args))
    set_up_logs(args)
    from lora_diffusion.workflows.dry_run import dry_run
    from lora_diffusion.workflows.train import train

    if args.dry_run:
        outlook = dry_run(config, resume=args.resume, overwrite=args.overwrite)
        print_result(args, outlook.to_json(), outlook.text())
        return
    result = train(config, resume=args.resume, overwrite=args.overwrite)
    lines = [f"Trained {result.num_steps} steps. The adapter:", *(f"  {path}" for path in result.files)]
    lines += ["The best one on held-out samples:", *(f"  {path}" for path in result.best)] if result.best else []
    lines += [result.selection.text()] if result.selection else []
    values = {
        "run": str(result.run_path),
        "steps": result.num_steps,
        "loss": result.loss,
        "files": list(map(str, result.files)),
        "best": list(map(str, result.best)),
        "selection": result.selection.to_json() if result.selection else None,
    }
    print_result(args, values, "\n".join(lines))
