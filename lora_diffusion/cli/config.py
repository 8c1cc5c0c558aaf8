"""`lora-diffusion config list|copy|check|show`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import add_config, config_and_overrides, print_result
from lora_diffusion.core.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("config", help="list, copy, check or show config files")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="name the configs that come along")
    listing.set_defaults(run=list_shipped)
    copying = actions.add_parser("copy", help="copy one of them, to be changed")
    copying.add_argument("name", help="as 'config list' prints it")
    copying.add_argument("target", type=Path, nargs="?", help="new file; default: its own name in this folder")
    copying.set_defaults(run=copy)
    for name, function, text in (
        ("check", check, "find every fault of a config"),
        ("show", show, "print every value with its meaning"),
    ):
        action = actions.add_parser(name, help=text)
        add_config(action, "train.max_steps=500")
        action.set_defaults(run=function)
    for action in actions.choices.values():
        # Without a default of their own, so that they do not undo what stands before the action.
        keep = argparse.SUPPRESS
        action.add_argument("--json", action="store_true", default=keep, help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=keep, help="show the traceback of an error")


def list_shipped(args: argparse.Namespace) -> None:
    """Prints name and first line of each shipped config."""
    from lora_diffusion.config.load import shipped

    configs = shipped()
    width = max(map(len, configs))
    lines = [f"{name:<{width}}  {text}" for name, (_, text) in configs.items()]
    print_result(args, {name: text for name, (_, text) in configs.items()}, "\n".join(lines))


def copy(args: argparse.Namespace) -> None:
    """Copies a shipped config; never over a file."""
    from lora_diffusion.config.load import find_shipped
    from lora_diffusion.core.files import write_text

    source = find_shipped(args.name)
    target = args.target or Path(source.name)
    if target.exists():
        raise ConfigError(f"{target} exists; give another name: lora-diffusion config copy {args.name} NEW.yaml")
    write_text(target, source.read_text(encoding="utf-8"))
    print_result(args, {"file": str(target)}, f"Wrote {target}; run it with: lora-diffusion train --config {target}")


def check(args: argparse.Namespace) -> None:
    """Loads a config and says that it is right; faults are errors."""
    from lora_diffusion.config.load import load
    from lora_diffusion.workflows.config_check import check_config

    path, overrides = config_and_overrides(args)
    check_config(load(path, overrides))
    print_result(args, {"file": str(path), "ok": True}, f"{path or 'The config'} is right.")


def show(args: argparse.Namespace) -> None:
    """Prints the resolved config; without a file, the defaults."""
    from lora_diffusion.config.describe import explained_yaml
    from lora_diffusion.config.load import load, to_values

    path, overrides = config_and_overrides(args)
    config = load(path, overrides, required=False)
    print_result(args, to_values(config), explained_yaml(config))
