"""`lora-diffusion data check` and `lora-diffusion data caption`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result, set_up_logs
from lora_diffusion.cli.ask import add_base, read_base
from lora_diffusion.core.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Adds the commands."""
    parser = commands.add_parser("data", help="check a data set, or write captions for it")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    _add_check(actions)
    _add_caption(actions)
    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def _add_check(actions: Any) -> None:
    check = actions.add_parser("check", help="list all that is wrong with a data set, or what it holds")
    check.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="data.path; of images, unless model.family says else"
    )
    check.add_argument("--config", type=Path, help="YAML file, or a name of 'config list'")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="say data.captions=optional")
    check.set_defaults(run=run_check)


def _add_caption(actions: Any) -> None:
    caption = actions.add_parser("caption", help="write a caption beside each image that has none")
    caption.add_argument("folder", metavar="FOLDER", help="images to caption")
    add_base(caption)
    caption.add_argument(
        "--prompt", default="Describe the picture.", help="{name} and {folder} stand for file and folder"
    )
    caption.add_argument("--trigger", default="", metavar="WORDS", help="put before each caption that lacks them")
    caption.add_argument("--ending", default=".txt", help=".txt or .caption (.txt)")
    caption.add_argument("--overwrite", action="store_true", help="replace captions that are there")
    caption.set_defaults(run=run_caption)


def run_check(args: argparse.Namespace) -> None:
    """Runs `data check`."""
    from lora_diffusion.config.load import load
    from lora_diffusion.config.schema import REQUIRED, ModelOptions

    overrides = list(args.overrides)
    if args.folder and "=" in args.folder and not Path(args.folder).exists():
        overrides.insert(0, args.folder)
    elif args.folder:
        overrides.insert(0, f"data.path={args.folder}")
    config = load(args.config, overrides, required=False)
    names_base = config.model.path != REQUIRED
    if not names_base and config.model.family == ModelOptions.family:
        # Only its sizes count.
        config = replace(config, model=replace(config.model, path="builtin:emoji"))
    if config.model.path == REQUIRED:
        raise ConfigError(f"model.path must be given, since bases of model.family={config.model.family} differ.")
    if config.data.path == REQUIRED:
        raise ConfigError("There is nothing to check: give a FOLDER, or --config with a data.path.")
    set_up_logs(args)
    from lora_diffusion.workflows.data_check import check_data

    print_result(args, check_data(config, base_is_named=names_base))


def run_caption(args: argparse.Namespace) -> None:
    """Runs `data caption`."""
    model, adapters = read_base(args)
    set_up_logs(args)
    from lora_diffusion.workflows.data_caption import caption

    done = caption(
        args.folder,
        model,
        adapters=adapters,
        prompt=args.prompt,
        trigger=args.trigger,
        ending=args.ending,
        overwrite=args.overwrite,
    )
    print_result(args, done)
