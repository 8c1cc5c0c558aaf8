"""`lora-diffusion ask`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import print_result, set_up_logs
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.weighted import weighted_file


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("ask", help="ask about pictures, or score the answers")
    add_base(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", help="what to ask about each picture")
    what.add_argument("--score", action="store_true", help="compare with the answers of conversations: exact match, F1")
    parser.add_argument("--clip", metavar="NAME", help="with --score: a CLIP that scores the answers as captions")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="pictures or folders; conversations to score"
    )
    parser.set_defaults(run=run)


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a base that talks about pictures, and its adapters."""
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="a folder of LLaVA or a hub id (builtin:emoji-llava)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE:WEIGHT", help="may be given several times"
    )


def read_base(args: argparse.Namespace) -> tuple[Any, list[tuple[Path, float]]]:
    """Returns the options of the base and the adapters that `add_base` asked for."""
    from lora_diffusion.config.load import load

    given = [f"model.path={args.model}"] if args.model else []
    config = load(args.config, given if args.config else ["model.family=llava", *given], required=False)
    return config.model, [weighted_file(text) for text in args.adapter]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    missing = [str(path) for path in args.paths if not path.exists()]
    if args.clip and not args.score:
        raise ConfigError("--clip scores answers, which --score asks for; add it.")
    if missing:
        raise ConfigError(f"There is no {', '.join(missing)}; correct the path.")
    model, adapters = read_base(args)
    set_up_logs(args)
    from lora_diffusion import workflows

    if args.score:
        found = workflows.examine(model, args.paths, adapters, args.clip)
        results = dict(zip(map(str, args.paths), found, strict=True))
        lines = [line for name, result in results.items() for line in (f"{name}:", *result.lines())]
        print_result(args, {name: result.to_json() for name, result in results.items()}, "\n".join(lines))
        return
    answers = {str(path): text for path, text in workflows.ask(model, args.paths, args.question, adapters).items()}
    print_result(args, answers, "\n".join(f"{path}\t{text}" for path, text in answers.items()))
