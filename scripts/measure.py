"""Measures what adapters learn on the built-in base; prints the tables of docs/benchmarks.md.

python scripts/measure.py style      the blob style on faces that were not trained on
python scripts/measure.py concept    the octopus as a rare word
python scripts/measure.py whisper --seeds 0 1 2    the accent and the words of datasets/spoken-digits
python scripts/measure.py llava --seeds 0 1 2      the drawing style of datasets/emoji-questions
python scripts/measure.py quantization             validation loss after training on bf16, 8-bit and NF4 weights
python scripts/measure.py selection                what the evaluation says of runs that are far too long
python scripts/measure.py folder --train DIR --references DIR    configs/sd1/style.yaml untouched on any folder
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
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

_WRITERS: Mapping[str, tuple[_text_output.TextQuickstart, Mapping[str, str]]] = {
    "whisper": (whisper.TASK, {"wer": "WER", "cer": "CER"}),
    "llava": (llava.TASK, {"exact_match": "exact match", "token_f1": "token F1"}),
}
"""Task -> what is trained and scored, and each score's name in the table."""


def main() -> None:
    """Trains once for each seed, compares, and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["style", "concept", "folder", "quantization", "selection", *_WRITERS])
    parser.add_argument("--train", type=Path, help="captioned pictures to train on")
    parser.add_argument("--references", type=Path, help="captioned pictures of the same style, of other subjects")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training run for each")
    parser.add_argument("--draws", type=int, default=2, help="pictures of each prompt")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "lora-diffusion-measure")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="changes to the config")
    args = parser.parse_args()
    logs.set_up()
    if args.task in _WRITERS:
        _measure_writer(args.task, args.seeds, args.output, args.set)
        return
    if args.task in ("quantization", "selection"):
        # Run as a file, Python finds what lies beside it but not the folder that it lies in.
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import_module(f"scripts.measure_{args.task}").measure(args.output, args.seeds, args.set)
        return
    name = "concept" if args.task == "concept" else "style"
    data = shipped_path("datasets") / ("octopus" if args.task == "concept" else "blob-style")
    train, references = args.train or data / "train", args.references or data / "references"
    for seed in args.seeds:
        output = args.output / f"{args.task}-seed{seed}"
        overrides = [f"data.path={train}", f"output.path={output}", f"train.seed={seed}", *args.set]
        config = load(find_shipped(f"sd1/{name}"), overrides)
        result = train(config, overwrite=True)
        cases = _CONCEPT if args.task == "concept" else ()
        draws = range(args.draws)
        comparison = compare_with_base(config, result.files[0], references, Request("", 0), cases, draws)
        _print_table(f"{args.task}, seed {seed}, {comparison.scorer}", comparison)
        _save_grid(comparison, output / "measured.png", args.draws)


def _measure_writer(task: str, seeds: Sequence[int], output: Path, changes: Sequence[str]) -> None:
    """Prints one row for each seed and test set, as soon as it is known."""
    show, names = _WRITERS[task]
    titles = [f"{name} {moment}" for name in names.values() for moment in ("before", "after")]
    print(f"\n| seed | test set | {' | '.join(titles)} |\n|{'---|' * (2 + len(titles))}")
    for seed in seeds:
        config = _text_output.config_of(show, output / f"{task}-seed{seed}", [f"train.seed={seed}", *changes])
        result = train(config, overwrite=True)
        for name, (before, after) in _text_output.compare(show, config, result.files[0]).items():
            rates = [f"{one.scores[score]:.1%}" for score in names for one in (before, after)]
            print(f"| {seed} | {name} | {' | '.join(rates)} |", flush=True)


def _print_table(title: str, comparison: Comparison) -> None:
    print(f"\n{title}\n\n| pictures | CLIP image | CLIP text |\n|---|---|---|")
    for row in (*comparison.conditions, comparison.references):
        print(f"| {row.label} | {row.scores['clip_image']} | {row.scores.get('clip_text', '')} |")
    before, after = (comparison.condition(label).images for label in (WITHOUT_BASE, WITHOUT_ADAPTER))
    print(f"\nWithout trigger, adapter against base, same seeds: cosine {_similarity(before, after):.3f}")


def _similarity(before: Sequence[Image], after: Sequence[Image]) -> float:
    clip = load_clip()
    return float(torch.mean((clip.encode_images(before) * clip.encode_images(after)).sum(dim=1)))


def _save_grid(comparison: Comparison, path: Path, num_draws: int) -> None:
    save_image(comparison.sheet(range(0, len(comparison.grid.places()), num_draws)), path)
    print(f"Pictures: {path}")


if __name__ == "__main__":
    main()
