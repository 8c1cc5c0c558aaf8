"""`lora-diffusion config list|copy|check|show`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_config, config_and_overrides, print_result


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("config", help="list, copy, check or show config files")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="name the configs that come along")
    listing.set_defaults(run=list_shipped)
    copying = actions.add_parser("copy", help="copy one of them, to be changed")
    copying.add_argument("name", help="as 'config list' prints it")
    copying.add_argument("target", type=Path, nargs="?", help="new file; default: its name, in this folder")
    copying.set_defaults(run=copy)
    for name, function, text in (
        ("check", check, "find every error of a config"),
        ("show", show, "print every value with its meaning"),
    ):
        action = actions.add_parser(name, help=text)
        add_config(action, "train.max_steps=500")
        action.set_defaults(run=function)
    for action in actions.choices.values():
        # Without a default, so that they do not undo what stands before the action.
        keep = argparse.SUPPRESS
        action.add_argument("--json", action="store_true", default=keep, help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=keep, help="show the traceback of an error")


def list_shipped(args: argparse.Namespace) -> None:
    """Prints name and first line of each shipped config."""
    from lora_diffusion.workflows.config import list_configs

    print_result(args, list_configs())


def copy(args: argparse.Namespace) -> None:
    """Copies a shipped config; never over a file."""
    from lora_diffusion.workflows.config import copy_config

    print_result(args, copy_config(args.name, args.target))


def check(args: argparse.Namespace) -> None:
    """Loads a config and says that it is right; what is wrong is an error."""
    from lora_diffusion.config.load import load
    from lora_diffusion.workflows.config import check_config

    path, overrides = config_and_overrides(args)
    print_result(args, check_config(load(path, overrides), path))


def show(args: argparse.Namespace) -> None:
    """Prints the resolved config; without a file, the defaults."""
    from lora_diffusion.config.load import load
    from lora_diffusion.workflows.config import ShownConfig

    path, overrides = config_and_overrides(args)
    print_result(args, ShownConfig(load(path, overrides, required=False)))
