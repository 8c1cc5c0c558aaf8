"""`lora-diffusion transcribe`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._shared import print_result, set_up_logs
from lora_diffusion.core.weighted import weighted_file


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("transcribe", help="write down what recordings say, or score it")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="builtin:digits, a folder of Whisper or a hub id (builtin:digits)")
    parser.add_argument("--language", help="code of what is spoken, say en")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="FILE:WEIGHT", help="may be given several times"
    )
    parser.add_argument("--score", action="store_true", help="compare folders with their transcripts: WER and CER")
    parser.add_argument("recordings", nargs="+", type=Path, metavar="PATH", help="a recording, or a folder of them")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from lora_diffusion.config.load import load

    model, language = args.model, args.language
    given = [*([f"model.path={model}"] if model else []), *([f"model.language={language}"] if language else [])]
    config = load(args.config, given if args.config else ["model.family=whisper", *given], required=False)
    adapters = [weighted_file(text) for text in args.adapter]
    set_up_logs(args)
    from lora_diffusion import workflows

    if args.score:
        results = workflows.understand(config.model, args.recordings, adapters)
        pairs = list(zip(map(str, args.recordings), results, strict=True))
        lines = [line for name, result in pairs for line in (f"{name}:", *result.lines())]
        print_result(args, {name: result.to_json() for name, result in pairs}, "\n".join(lines))
        return
    heard = workflows.transcribe(config.model, args.recordings, adapters)
    texts = {str(one.path): one.text for one in heard}
    print_result(args, texts, "\n".join(f"{path}\t{text}" for path, text in texts.items()))
