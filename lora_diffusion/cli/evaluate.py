"""`lora-diffusion evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_diffusion.cli._arguments_and_output import base_of, print_result, set_up_logs, size
from lora_diffusion.core import registry
from lora_diffusion.core.errors import GateError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = commands.add_parser("evaluate", help="score adapters, checkpoints and weights against the base alone")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="take the base model from a training config")
    base.add_argument("--model", help="builtin:emoji, a folder, a .safetensors checkpoint or a hub id")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FILE:WEIGHT",
        help="may be given several times; A:0.8+B:0.6 are used together",
    )
    parser.add_argument("--run", type=Path, dest="run_path", metavar="RUN_DIR", help="compare the checkpoints of a run")
    parser.add_argument("--weights", type=_numbers, default=(1.0,), help="multiply all weights with each, say 0,0.5,1")
    parser.add_argument("--prompts", required=True, metavar="FILE|SUITE", help="prompt suite, say dreambooth-object")
    parser.add_argument("--trigger", action="append", default=[], help="words for {trigger}, the next for {trigger2}")
    parser.add_argument(
        "--class", action="append", default=[], dest="classes", help="words for {class}, the next for {class2}"
    )
    _add_images(parser)
    parser.add_argument(
        "--metrics",
        type=_names,
        default=(),
        metavar="NAME,NAME",
        help=f"some of {', '.join(registry.available('metrics'))}; default: all that can be computed",
    )
    parser.add_argument("--clip", metavar="NAME", help="CLIP that scores: MODEL/TAG of open_clip, a folder or a hub id")
    parser.add_argument(
        "--scorer",
        action="append",
        type=_pair,
        default=[],
        metavar="ROLE=NAME",
        help="another model that scores, say dino=FOLDER",
    )
    parser.add_argument("--seed", action="append", type=int, help="may be given several times; default 0 to 3")
    parser.add_argument("--negative", default="", help="what the images should not show")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (25)")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt (by the base); 1 = off")
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels; default: what the base was trained on")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep images there too, for other evaluations")
    parser.add_argument(
        "--assert",
        action="append",
        default=[],
        dest="gates",
        metavar="METRIC>=NUMBER",
        help='exit with 1 unless it holds for all candidates; "METRIC@CANDIDATE>=NUMBER" asks for one',
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the result; images in it are used again")
    parser.set_defaults(run=run)


def _add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name images to compare with."""
    parser.add_argument("--references", type=Path, metavar="DIR", help="real images that were not trained on")
    parser.add_argument(
        "--concept",
        action="append",
        default=[],
        dest="concepts",
        metavar="subject:TRIGGER=DIR",
        help="what a composition is to show, with its real images; or style:TRIGGER=DIR; may be given several times",
    )
    parser.add_argument("--training", type=Path, metavar="DIR", help="training images, to find copies")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    configured = base_of(args) if args.config or args.model is not None else None
    set_up_logs(args)
    from lora_diffusion.workflows.bases import find_model
    from lora_diffusion.workflows.evaluate import EvaluationRequest, check_gates, evaluate

    request = EvaluationRequest(
        output_path=args.output,
        prompts=args.prompts,
        model=find_model(args.model) if args.model else configured,
        adapters=args.adapter,
        run=args.run_path,
        weights=args.weights,
        references=args.references,
        concepts=args.concepts,
        training=args.training,
        metrics=args.metrics,
        scorers=dict(args.scorer) | ({"clip": args.clip} if args.clip else {}),
        seeds=args.seed or (0, 1, 2, 3),
        triggers=args.trigger,
        classes=args.classes,
        num_steps=args.steps,
        guidance=args.guidance,
        size=args.size,
        negative=args.negative,
        cache_path=args.cache,
        gates=args.gates,
    )
    result = check_gates(evaluate(request), args.output, args.gates)
    print_result(args, result)
    if result.failed:
        raise GateError(f"{len(result.failed)} condition(s) of --assert do not hold.", result.failed)


def _pair(text: str) -> tuple[str, str]:
    role, sign, name = text.partition("=")
    if not role or not sign or not name:
        raise argparse.ArgumentTypeError(f"{text!r} names no scorer; write ROLE=NAME, say dino=FOLDER")
    return role, name


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write them with commas, say 0,0.5,1") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))
