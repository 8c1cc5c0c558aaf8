"""`lora-diffusion train`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import print_result, set_up_logs


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train an adapter from a folder of pictures")
    parser.add_argument("--config", type=Path, help="YAML file, or a name of 'config list'")
    parser.add_argument("--resume", action="store_true", help="continue the run in output.path where it stopped")
    parser.add_argument("--dry-run", action="store_true", help="show data, plan and memory; train nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in output.path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="say data.path=photos train.max_steps=500")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    config = load(args.config, args.overrides)
    set_up_logs(args)
    from lora_diffusion import workflows

    if args.dry_run:
        outlook = workflows.dry_run(config, overwrite=args.overwrite)
        print_result(args, outlook.to_json(), outlook.text())
        return
    result = workflows.train(config, resume=args.resume, overwrite=args.overwrite)
    files = "\n".join(f"  {path}" for path in result.files)
    print_result(
        args,
        {
            "run": str(result.run_path),
            "steps": result.num_steps,
            "loss": result.loss,
            "files": list(map(str, result.files)),
        },
        f"Trained {result.num_steps} steps. The adapter:\n{files}",
    )
