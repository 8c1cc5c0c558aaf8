"""`lora-diffusion ask`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_csv, check_csv, print_result, set_up_logs
from lora_diffusion.compose.plan import weighted_file
from lora_diffusion.core.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("ask", help="ask about images, or score the answers")
    add_base(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", help="what to ask about each image")
    what.add_argument("--score", action="store_true", help="compare with the answers of conversations: exact match, F1")
    parser.add_argument("--clip", metavar="NAME", help="with --score: a CLIP that scores the answers as captions")
    parser.add_argument("--images", metavar="DIR", help="with --score: folder of the images that the data names")
    parser.add_argument("--split", metavar="NAME", help="with --score: folder, file or split to score on (all)")
    add_csv(parser, "the answers")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="images or folders; conversations to score")
    parser.set_defaults(run=run)


def add_base(parser: argparse.ArgumentParser) -> None:
    """Adds the options that choose a base of visual question answering, and its adapters."""
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="a folder of LLaVA or a hub id (builtin:emoji-llava)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE:WEIGHT", help="may be given several times"
    )


def read_base(args: argparse.Namespace) -> tuple[Any, list[tuple[Path, float]]]:
    """Returns the options of the base and the adapters that `add_base` asked for."""
    config = _config(args)
    return config.model, [weighted_file(text) for text in args.adapter]


def _config(args: argparse.Namespace) -> Any:
    from lora_diffusion.config.load import load

    given = [f"model.path={args.model}"] if args.model else []
    return load(args.config, given if args.config else ["model.family=llava", *given], required=False)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    missing = [str(path) for path in args.paths if not path.exists()]
    if idle := [f"--{name}" for name in ("clip", "images", "split") if getattr(args, name) and not args.score]:
        raise ConfigError(f"{idle[0]} is about answers that are compared, which --score asks for; add it.")
    if missing:
        raise ConfigError(f"There is no {', '.join(missing)}; correct the path.")
    check_csv(args)
    model, adapters = read_base(args)
    set_up_logs(args)
    from lora_diffusion.workflows.ask import ask, score_answers

    result: Any
    if args.score:
        result = score_answers(model, args.paths, adapters, args.clip, _data(args))
    else:
        result = ask(model, args.paths, args.question, adapters)
    if args.csv:
        result.write_table(args.csv)
    print_result(args, result)


def _data(args: argparse.Namespace) -> Any:
    """Returns how conversations to score are read: as the config says, of all splits unless --split names one."""
    from dataclasses import replace

    from lora_diffusion.config.schema import ChatDataConfig

    data = _config(args).data
    config = data if isinstance(data, ChatDataConfig) else ChatDataConfig()
    return replace(config, images=args.images or config.images, split=args.split or "all")
