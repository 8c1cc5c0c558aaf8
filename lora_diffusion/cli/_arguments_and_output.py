"""What several commands share: configs, ranks, weights and sizes on the command line, and printing a result."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lora_diffusion.compose.plan import weighted_file
from lora_diffusion.core import registry
from lora_diffusion.core.errors import ConfigError
from lora_diffusion.core.launch import process_index
from lora_diffusion.core.result import Result
from lora_diffusion.core.text import printable, printable_json

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")


def print_result(args: argparse.Namespace, result: Result) -> None:
    """Prints a result on stdout, of several processes once: as JSON where `--json` is given, else as text.

    Both are without control characters.
    """
    if process_index() > 0:
        return
    if args.json:
        is_unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")
        print(printable_json(json.dumps(result.to_json(), indent=2, ensure_ascii=not is_unicode)))
    else:
        print(printable(result.text()))


def set_up_logs(args: argparse.Namespace) -> None:
    """Starts logging; call it once the arguments are known to be right, since it loads rich."""
    from lora_diffusion.core import logs

    logs.set_up(args.debug)


def add_config(parser: argparse.ArgumentParser, example: str) -> None:
    """Adds a config and changes to it; the config may stand before the changes without its --config."""
    parser.add_argument("--config", type=Path, help="YAML file, or a name of 'config list'")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"say {example}")


def config_and_overrides(args: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """Returns the values of `add_config`."""
    first = args.overrides[0] if args.overrides else "="
    if args.config is None and ("=" not in first or Path(first).exists()):
        return Path(first), args.overrides[1:]
    return args.config, args.overrides


def add_csv(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the options that ask for a table."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help=f"write {what} with their scores into a table")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def check_csv(args: argparse.Namespace) -> None:
    """Checks the values of `add_csv`, before anything takes time.

    Raises:
        ConfigError: the file is there, or could not be written.
    """
    from lora_diffusion.core.files import check_writable

    if args.csv is None:
        return
    if args.csv.is_dir() or (args.csv.exists() and not args.overwrite):
        raise ConfigError(f"--csv {args.csv} is there already; name another file, or add --overwrite.")
    check_writable(args.csv.parent, "--csv")


def base_of(args: argparse.Namespace) -> Any:
    """Returns the base that `--config` names; None where `--model` does.

    Raises:
        ConfigError: the config names none, or `--model` is empty.
    """
    from lora_diffusion.config.load import load
    from lora_diffusion.config.schema import REQUIRED

    if args.model:
        return None
    model = load(args.config, required=False).model if args.config else None
    if model is None or model.path == REQUIRED:
        raise ConfigError(f"{args.config or '--model'} names no base; give model.path in it, or --model NAME.")
    return model


def add_family(parser: argparse.ArgumentParser, otherwise: str) -> None:
    """Adds the option that names the family of the base; `otherwise` says what decides without it."""
    parser.add_argument(
        "--family", choices=registry.available("families"), help=f"family of the base; default: {otherwise}"
    )


def add_rank(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds the options that choose a rank: a number, or a share of what the adapter does."""
    group = parser.add_mutually_exclusive_group(required=required)
    otherwise = "" if required else "; without either the result is exact, and the ranks add up"
    group.add_argument("--rank", type=int, help=f"rank of each module{otherwise}")
    group.add_argument("--energy", type=float, help="share of each module's squared norm to keep, say 0.95")


def add_embeddings(parser: argparse.ArgumentParser) -> None:
    """Adds the option for text embeddings that are packed into adapter files."""
    parser.add_argument(
        "--embeddings",
        choices=["keep", "drop"],
        default="keep",
        help="text embeddings that come along in the file, bundle_emb (keep)",
    )


def weighted_parts(text: str) -> tuple[Path, float | dict[str, float]]:
    """Reads FILE, FILE:WEIGHT or FILE:PART=WEIGHT,PART=WEIGHT.

    Raises:
        ConfigError: a weight is not a number, a part is named twice, or there is no such file.
    """
    path, _, tail = text.rpartition(":")
    if Path(text).exists() or "=" not in tail or not Path(path).exists():
        return weighted_file(text, "adapter")
    pairs = [pair.partition("=") for pair in tail.split(",")]
    wrong = [part + sign + number for part, sign, number in pairs if not part or not _NUMBER.fullmatch(number)]
    if wrong or len({part for part, _, _ in pairs}) < len(pairs):
        raise ConfigError(
            f"adapter {text}: {', '.join(wrong) or tail} does not give each part one weight; write "
            "FILE:PART=WEIGHT,PART=WEIGHT, say style.safetensors:unet=0.8,text_encoder=0.5."
        )
    return weighted_file(path, "adapter")[0], {part: float(number) for part, _, number in pairs}


def size(text: str) -> tuple[int, int]:
    """Reads WIDTHxHEIGHT in pixels."""
    match = re.fullmatch(r"0*(\d+)x0*(\d+)", text)
    if not match or "0" in match.groups():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write WIDTHxHEIGHT, say 512x768")
    return int(match[1]), int(match[2])
