"""Measures what adapters learn on the built-in base; prints the tables of docs/benchmarks.md.

python -m scripts.measure style      the blob style on faces that were not trained on
python -m scripts.measure concept    the octopus as a rare word
python -m scripts.measure whisper --seeds 0 1 2    the accent and the words of datasets/spoken-digits
python -m scripts.measure llava --seeds 0 1 2      the drawing style of datasets/emoji-questions
python -m scripts.measure quantization             validation loss after training on bf16, 8-bit and NF4 weights
python -m scripts.measure selection                what the evaluation says of runs that are far too long
python -m scripts.measure speech --seeds 0 1 2     Whisper adapters beside those of transformers' trainer
python -m scripts.measure peers --seeds 0 1 2      ours beside a plain loop with PEFT, on six sample sets
python -m scripts.measure folder --train DIR --references DIR    configs/sd1/style.yaml untouched on any folder
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL.Image import Image

from lora_diffusion.config.load import find_shipped, load
from lora_diffusion.core import logs
from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.samples import Request
from lora_diffusion.data.images import save_image
from lora_diffusion.evaluation.harness import WITHOUT_ADAPTER, WITHOUT_BASE, Comparison
from lora_diffusion.evaluation.results import Case
from lora_diffusion.quickstart import _text_output, llava, whisper
from lora_diffusion.scoring.clip import load_clip
from lora_diffusion.workflows.evaluate import compare_with_base
from lora_diffusion.workflows.train import train
from scripts.measure import quantization, selection, speech_trainers
from scripts.measure.peers import comparison
from scripts.measure.peers.plain_loop import RECIPES
from scripts.measure.peers.sample_sets import SAMPLE_SETS
from scripts.measure.peers.trainings import Trainings

_RARE = "zwx"
_PAIRS = [
    (f"an emoji of a {_RARE}, {style} style", f"an emoji of a {other}, {style} style")
    for style in ("noto", "twemoji", "fluent", "flat")
    for other in ("cat face", "red apple", "rose", "frog")
]
_CONCEPT = [
    Case(index, prompt, control, "an emoji of an octopus", "subject", "measure")
    for index, (prompt, control) in enumerate(_PAIRS)
]

_TEXT_OUTPUT: Mapping[str, tuple[_text_output.TextQuickstart, Mapping[str, str]]] = {
    "whisper": (whisper.TASK, {"wer": "WER", "cer": "CER"}),
    "llava": (llava.TASK, {"exact_match": "exact match", "token_f1": "token F1"}),
}
"""Task -> what is trained and scored, and each score's name in the table."""
_OTHERS: Mapping[str, Callable[[Path, Sequence[int], Sequence[str]], None]] = {
    "quantization": quantization.measure,
    "selection": selection.measure,
    "speech": speech_trainers.measure,
}


def main() -> None:
    """Trains once for each seed, compares, and prints Markdown tables."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["style", "concept", "folder", "peers", *_TEXT_OUTPUT, *_OTHERS])
    parser.add_argument("--train", type=Path, help="captioned images to train on")
    parser.add_argument("--references", type=Path, help="captioned images of the same style, of other subjects")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training run for each")
    parser.add_argument("--draws", type=int, default=2, help="images of each prompt")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "lora-diffusion-measure")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to the config")
    peers = parser.add_argument_group("peers")
    peers.add_argument("--sets", nargs="+", choices=list(SAMPLE_SETS), default=[], help="without it all")
    peers.add_argument("--methods", nargs="+", choices=list(RECIPES), default=[], help="beside ours; without it all")
    peers.add_argument("--steps", type=int, help="of ours, instead of those of the shipped configs")
    peers.add_argument("--compositions", action="store_true", help="pairs of our adapters, too")
    args = parser.parse_args()
    logs.set_up()
    if args.task in _TEXT_OUTPUT:
        _measure_texts(args.task, args.seeds, args.output, args.set)
    elif args.task == "peers":
        trainings = Trainings(args.output, args.steps, args.set)
        sampling = comparison.Sampling(args.draws)
        comparison.measure(trainings, args.sets, args.methods, args.seeds, sampling, compositions=args.compositions)
    elif args.task in _OTHERS:
        _OTHERS[args.task](args.output, args.seeds, args.set)
    else:
        _measure_images(args)


def _measure_images(args: argparse.Namespace) -> None:
    """Prints a table for each seed of `style`, `concept` or `folder`."""
    name = "concept" if args.task == "concept" else "style"
    data = shipped_path("datasets") / ("octopus" if args.task == "concept" else "blob-style")
    training, references = args.train or data / "train", args.references or data / "references"
    for seed in args.seeds:
        output = args.output / f"{args.task}-seed{seed}"
        overrides = [f"data.path={training}", f"output.path={output}", f"train.seed={seed}", *args.set]
        config = load(find_shipped(f"sd1/{name}"), overrides)
        result = train(config, overwrite=True)
        cases = _CONCEPT if args.task == "concept" else ()
        draws = range(args.draws)
        comparison = compare_with_base(config, result.files[0], references, Request("", 0), cases, draws)
        _print_table(f"{args.task}, seed {seed}, {comparison.scorer}", comparison)
        _save_grid(comparison, output / "measured.png", args.draws)


def _measure_texts(task: str, seeds: Sequence[int], output: Path, changes: Sequence[str]) -> None:
    """Prints one row for each seed and test set, as soon as it is known."""
    quickstart, names = _TEXT_OUTPUT[task]
    titles = [f"{name} {moment}" for name in names.values() for moment in ("before", "after")]
    print(f"\n| seed | test set | {' | '.join(titles)} |\n|{'---|' * (2 + len(titles))}")
    for seed in seeds:
        config = _text_output.config_of(quickstart, output / f"{task}-seed{seed}", [f"train.seed={seed}", *changes])
        result = train(config, overwrite=True)
        for name, (before, after) in _text_output.compare(quickstart, config, result.files[0]).items():
            rates = [f"{one.scores[score]:.1%}" for score in names for one in (before, after)]
            print(f"| {seed} | {name} | {' | '.join(rates)} |", flush=True)


def _print_table(title: str, comparison: Comparison) -> None:
    print(f"\n{title}\n\n| images | CLIP image | CLIP text |\n|---|---|---|")
    for row in (*comparison.conditions, comparison.references):
        print(f"| {row.label} | {row.scores['clip_image']} | {row.scores.get('clip_text', '')} |")
    before, after = (comparison.condition(label).images for label in (WITHOUT_BASE, WITHOUT_ADAPTER))
    print(f"\nWithout trigger, adapter against base, same seeds: cosine {_similarity(before, after):.3f}")


def _similarity(before: Sequence[Image], after: Sequence[Image]) -> float:
    clip = load_clip()
    return float(torch.mean((clip.encode_images(before) * clip.encode_images(after)).sum(dim=1)))


def _save_grid(comparison: Comparison, path: Path, num_draws: int) -> None:
    save_image(comparison.sheet(range(0, len(comparison.grid.places()), num_draws)), path)
    print(f"Images: {path}")


if __name__ == "__main__":
    main()
