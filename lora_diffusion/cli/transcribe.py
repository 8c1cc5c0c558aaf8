"""`lora-diffusion transcribe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import add_csv, check_csv, print_result, set_up_logs
from lora_diffusion.compose.plan import weighted_file
from lora_diffusion.core.errors import ConfigError

_FORMATS = ("txt", "srt", "vtt", "csv", "json")
_SUBTITLES = ("srt", "vtt")
"""Formats that ask the base for timestamps."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("transcribe", help="write down what recordings say, or score it")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="builtin:digits, a folder of Whisper or a hub id (builtin:digits)")
    parser.add_argument("--language", help="code of what is spoken, say en")
    parser.add_argument(
        "--timestamps",
        action=argparse.BooleanOptionalAction,
        help="ask the base when words were said (for srt and vtt)",
    )
    parser.add_argument("--beams", type=int, metavar="N", help="follow N transcripts at once, say 5 (1)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE:WEIGHT", help="may be given several times"
    )
    parser.add_argument("--format", choices=_FORMATS, help="write transcripts so; srt and vtt are subtitles")
    parser.add_argument("--output", type=Path, metavar="PATH", help="with --format: a file, or a folder for several")
    parser.add_argument("--score", action="store_true", help="compare folders with their transcripts: WER and CER")
    parser.add_argument("--split", metavar="NAME", help="with --score: folder, table or split to score on (all)")
    add_csv(parser, "with --score: the transcripts")
    parser.add_argument("recordings", nargs="+", type=Path, metavar="PATH", help="a recording, or a folder of them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    _check(args)
    config = _config(args)
    adapters = [weighted_file(text) for text in args.adapter]
    set_up_logs(args)
    from lora_diffusion.workflows.transcribe import score_transcripts, transcribe, write_transcripts

    if args.score:
        scores = score_transcripts(config.model, args.recordings, adapters, _data(args, config))
        if args.csv:
            scores.write_table(args.csv)
        print_result(args, scores)
    elif args.format:
        written = write_transcripts(
            config.model, args.recordings, adapters, args.format, args.output, overwrite=args.overwrite
        )
        if written.files:
            print_result(args, written)
        else:
            print(written.document, end="")  # a file on stdout, byte for byte
    else:
        print_result(args, transcribe(config.model, args.recordings, adapters))


def _check(args: argparse.Namespace) -> None:
    wanted = {"--format": args.format, "--split": args.split, "--csv": args.csv}
    if args.score and args.format:
        raise ConfigError("--format writes transcripts, and --score compares them; --csv writes those with scores.")
    if idle := [name for name in ("--split", "--csv") if wanted[name] and not args.score]:
        more = "; --format csv writes plain transcripts" if idle[0] == "--csv" else ""
        raise ConfigError(f"{idle[0]} is about transcripts that are compared, which --score asks for; add it{more}.")
    if args.output and not args.format:
        raise ConfigError(f"--output {args.output} needs --format, one of {', '.join(_FORMATS)}.")
    if args.json and args.format not in (None, "json") and not args.output:
        raise ConfigError(f"--json prints JSON, and --format {args.format} something else; drop one, or add --output.")
    check_csv(args)


def _config(args: argparse.Namespace) -> Any:
    from lora_diffusion.config.load import load

    timed = args.format in _SUBTITLES or None if args.timestamps is None else args.timestamps
    given = {
        "path": args.model,
        "language": args.language,
        "num_beams": args.beams,
        "timestamps": None if timed is None else str(timed).lower(),
    }
    changes = [f"model.{key}={value}" for key, value in given.items() if value not in (None, "")]
    return load(args.config, changes if args.config else ["model.family=whisper", *changes], required=False)


def _data(args: argparse.Namespace, config: Any) -> Any:
    """Returns how recordings to score are read: as the config says, of all splits unless --split names one."""
    from dataclasses import replace

    from lora_diffusion.config.schema import RecordingDataConfig

    data = config.data if isinstance(config.data, RecordingDataConfig) else RecordingDataConfig()
    return replace(data, split=args.split or "all")
