"""`lora-diffusion metadata show|edit|strip`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import print_result
from lora_diffusion.core.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("metadata", help="show, change or take out the texts in an adapter file")
    actions = parser.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print all texts")
    edit = actions.add_parser("edit", help="set or take out single texts; the tensors keep every byte")
    strip = actions.add_parser("strip", help="take out all that apps do not need")
    for action in (show, edit, strip):
        action.add_argument("path", type=Path, metavar="FILE", help=".safetensors file")
        # Without a default, so that they do not undo what stands before the action.
        keep = argparse.SUPPRESS
        action.add_argument("--json", action="store_true", default=keep, help="print the result as JSON")
        action.add_argument("--debug", action="store_true", default=keep, help="show the traceback of an error")
    for action in (edit, strip):
        action.add_argument("--output", type=Path, help="write there instead of into the file itself")
        action.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")
    edit.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="values",
        help="say modelspec.title=Blorp",
    )
    edit.add_argument(
        "--unset", nargs="+", action="extend", default=[], metavar="KEY", dest="removed", help="takes it out"
    )
    edit.add_argument("--thumbnail", type=Path, help="image that is scaled down and put into the file")
    strip.add_argument(
        "--keep", nargs="+", action="extend", default=[], metavar="KEY", help='"ss_*" keeps all of those'
    )
    show.set_defaults(run=_show)
    edit.set_defaults(run=_edit)
    strip.set_defaults(run=_strip)


def _show(args: argparse.Namespace) -> None:
    from lora_diffusion.workflows.metadata import show_metadata

    print_result(args, show_metadata(args.path))


def _edit(args: argparse.Namespace) -> None:
    unclear = [pair for pair in args.values if "=" not in pair.lstrip("=")]
    if unclear:
        raise ConfigError(f"--set {unclear[0]}: write KEY=VALUE, say modelspec.title='Blorp style'.")
    values = dict(pair.split("=", 1) for pair in args.values)
    from lora_diffusion.workflows.metadata import edit_metadata

    change = edit_metadata(
        args.path,
        values,
        args.removed,
        thumbnail=args.thumbnail,
        output_path=args.output,
        overwrite=args.overwrite,
    )
    print_result(args, change)


def _strip(args: argparse.Namespace) -> None:
    from lora_diffusion.workflows.metadata import strip_metadata

    change = strip_metadata(args.path, args.keep, args.output, overwrite=args.overwrite)
    print_result(args, change)
