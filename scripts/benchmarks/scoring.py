"""Measures what scoring costs against torchmetrics, and what an evaluation costs besides generating and scoring.

python -m scripts.benchmarks evaluate               # 2,000 images
python -m scripts.benchmarks evaluate --num 500 --repeats 1

Both arms read the same PNG files, score them with the same CLIP in batches of the same size, and take turns:

    ours            scoring.metrics.clip_text
    torchmetrics    CLIPScore, which gets the images as uint8 tensors

Then an evaluation of one adapter on the built-in base, of which the time that is neither generating nor CLIP is shown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.core.evidence import Evidence
from lora_diffusion.core.files import shipped_path
from lora_diffusion.scoring.clip import BUILTIN, Clip, load_clip
from lora_diffusion.scoring.image_encoding import BATCH
from lora_diffusion.scoring.metrics.clip_text import METRIC as CLIP_TEXT
from lora_diffusion.scoring.scorers import Scorers
from scripts.benchmarks.processes import Cost, measured

_SIDES = (64, 64, 64, 96)
"""Most images have the size that the CLIP wants, as generated ones have; some must be scaled."""
_SETS = ("blob-style", "octopus")
TARGETS = {"torchmetrics / ours": 1.5, "share outside": 0.05}


class OpenClipModel:
    """An open_clip model as torchmetrics wants one: with the methods of transformers' CLIPModel."""

    config = None

    def __init__(self, model: Any) -> None:
        """Wraps a model."""
        self._model = model

    def to(self, device: torch.device) -> OpenClipModel:
        """Returns itself: the model is where it computes."""
        del device
        return self

    def get_image_features(self, pixels: Tensor) -> Tensor:
        """Returns [batch, dim]."""
        with torch.no_grad():
            return self._model.encode_image(pixels)  # type: ignore[no-any-return]

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Returns [batch, dim]."""
        del mask  # open_clip finds the end of the text by its token
        with torch.no_grad():
            return self._model.encode_text(ids)  # type: ignore[no-any-return]


class OpenClipProcessor:
    """The transform and tokenizer of open_clip as torchmetrics wants them: as transformers' CLIPProcessor."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], tokenizer: Any) -> None:
        """Wraps what `open_clip.create_model_and_transforms` and `get_tokenizer` return."""
        self._transform, self._tokenizer = transform, tokenizer

    def __call__(
        self, images: Sequence[Tensor] = (), text: Sequence[str] = (), return_tensors: str = "pt", padding: bool = True
    ) -> dict[str, Tensor]:
        """Returns what the model takes."""
        from torchvision.transforms.functional import to_pil_image

        del return_tensors, padding
        if images:
            return {"pixel_values": torch.stack([self._transform(to_pil_image(image)) for image in images])}
        ids = self._tokenizer(list(text))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def torchmetrics_clip(name: str = BUILTIN) -> tuple[OpenClipModel, OpenClipProcessor]:
    """Returns the model and the processor of a built-in or open_clip model."""
    import open_clip

    from lora_diffusion.scoring.clip import _source

    architecture, tag = _source(name, open_clip.list_models())
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=tag)
    return OpenClipModel(model.eval()), OpenClipProcessor(transform, open_clip.get_tokenizer(architecture))


def make_images(folder: Path, num: int, sides: Sequence[int] = _SIDES) -> tuple[list[Path], list[str]]:
    """Writes crops of the sample sets as PNG; returns the files and what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = [path for name in _SETS for path in sorted((shipped_path("datasets") / name).rglob("*.png"))]
    paths, texts = [], []
    for index in range(num):
        source = samples[index % len(samples)]
        with Image.open(source) as image:
            left, top, right, bottom = rng.integers(0, 8, 4)
            width, height = image.size
            side = sides[index % len(sides)]
            cut = image.convert("RGB").crop((left, top, width - right, height - bottom))
            paths.append(folder / f"{index:05d}.png")
            cut.resize((side, side + index % 3 * (side > 64)), Image.Resampling.BICUBIC).save(paths[-1])
        texts.append(source.with_suffix(".txt").read_text(encoding="utf-8").strip())
    return paths, texts


def score_ours(clip: Clip, paths: Sequence[Path], texts: Sequence[str]) -> float:
    """Returns the mean cosine."""
    scorers = Scorers({"clip": clip.name}, models={"clip": clip})
    return CLIP_TEXT.score(Evidence(paths, texts, scorers=scorers)).mean()


def score_torchmetrics(
    parts: tuple[OpenClipModel, OpenClipProcessor], paths: Sequence[Path], texts: Sequence[str]
) -> float:
    """Returns the mean cosine."""
    from torchmetrics.multimodal.clip_score import CLIPScore

    metric = CLIPScore(lambda: parts)  # type: ignore[arg-type,return-value]
    for start in range(0, len(paths), BATCH):
        images = []
        for path in paths[start : start + BATCH]:
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        metric.update(images, list(texts[start : start + BATCH]))
    return metric.compute().item() / 100


def compare(num: int, repeats: int) -> dict[str, Any]:
    """Returns medians of wall and CPU seconds of both arms, their ratios, and how far the scores are apart."""
    clip, parts = load_clip(), torchmetrics_clip()
    arms: dict[str, Callable[[Sequence[Path], Sequence[str]], float]] = {
        "ours": lambda paths, texts: score_ours(clip, paths, texts),
        "torchmetrics": lambda paths, texts: score_torchmetrics(parts, paths, texts),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in arms}
    scores: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths, texts = make_images(Path(folder), num)
        for arm in arms.values():
            arm(paths[:BATCH], texts[:BATCH])  # to warm up
        for _ in range(repeats):
            for name, arm in arms.items():
                scores[name], cost = measured(arm, paths, texts)
                costs[name].append(cost)
    medians = {
        name: {key: statistics.median(getattr(cost, key) for cost in samples) for key in ("wall_s", "cpu_s")}
        for name, samples in costs.items()
    }
    ratio = {key: medians["torchmetrics"][key] / medians["ours"][key] for key in medians["ours"]}
    difference = abs(scores["ours"] - scores["torchmetrics"])
    setting = {"images": num, "texts": len(set(texts)), "threads": torch.get_num_threads(), "clip": clip.name}
    return {"setting": setting, "arms": medians, "torchmetrics / ours": ratio, "score difference": difference}


def measure_overhead(num_seeds: int) -> dict[str, float]:
    """Returns the CPU seconds of an evaluation on the built-in base: generating, CLIP, loading, and all else."""
    from lora_diffusion.config.load import load
    from lora_diffusion.families.sd1 import FAMILY
    from lora_diffusion.workflows.evaluate import EvaluationRequest, evaluate

    spent = dict.fromkeys(("generating", "CLIP", "loading"), 0.0)
    faces = shipped_path("datasets") / "blob-style"
    with tempfile.TemporaryDirectory() as folder:
        request = EvaluationRequest(
            output_path=Path(folder) / "evaluation",
            prompts="emoji-style",
            model=load(None, ["model.path=builtin:emoji"], required=False).model,
            adapters=[str(_untrained_adapter(Path(folder)))],
            triggers=["blob style"],
            seeds=range(num_seeds),
            references=faces / "references",
            training=faces / "train",
        )
        clip = type(load_clip().model)  # imports what a first evaluation in a process imports
        started = time.process_time()
        with (
            _timed(type(FAMILY), "generate", spent, "generating"),
            _timed(type(FAMILY), "load", spent, "loading"),
            _timed(clip, "encode_image", spent, "CLIP"),
            _timed(clip, "encode_text", spent, "CLIP"),
        ):
            evaluation = evaluate(request)
        total = time.process_time() - started
    num_images = len({score.image for score in evaluation.scores if score.image})
    rest = total - sum(spent.values())
    return {"images": num_images, **spent, "all else": rest, "total": total, "share outside": rest / total}


@contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float], key: str) -> Iterator[None]:
    """Adds the CPU seconds in a method of a class to `spent[key]`."""
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            spent[key] += time.process_time() - started

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _untrained_adapter(folder: Path) -> Path:
    """Writes an adapter that changes little, without a training run."""
    from lora_diffusion.config.load import find_shipped, load
    from lora_diffusion.workflows.train import train

    faces = shipped_path("datasets") / "blob-style" / "train"
    overrides = [f"data.path={faces}", f"output.path={folder / 'run'}", "train.max_steps=1", "train.warmup_steps=0"]
    return train(load(find_shipped("sd1/style"), overrides)).files[0]


def add_parser(commands: Any) -> None:
    """Adds `evaluate` to the benchmarks."""
    parser = commands.add_parser("evaluate", help="scoring, and what an evaluation costs besides it")
    parser.add_argument("--num", type=int, default=2000, help="images to score")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each arm")
    parser.add_argument("--seeds", type=int, default=2, help="images of each prompt of the evaluation")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints."""
    from lora_diffusion.runtime.autotune import use_threads

    use_threads("auto")
    result = compare(arguments.num, arguments.repeats) | {"evaluation": measure_overhead(arguments.seeds)}
    print(json.dumps(result, indent=2)) if arguments.json else print_report(result)


def print_report(result: dict[str, Any]) -> None:
    """Prints the tables for people."""
    print(" ".join(f"{name}={value}" for name, value in result["setting"].items()))
    print(f"{'':24}{'wall s':>10}{'CPU s':>10}")
    for name, values in [*result["arms"].items(), ("torchmetrics / ours", result["torchmetrics / ours"])]:
        print(f"{name:24}{values['wall_s']:10.2f}{values['cpu_s']:10.2f}")
    print(f"at least {TARGETS['torchmetrics / ours']}; mean scores differ by {result['score difference']:.1e}")
    print("Evaluation, CPU s: " + ", ".join(f"{name} {value:.3g}" for name, value in result["evaluation"].items()))
    print(f"share outside of generating, CLIP and loading at most {TARGETS['share outside']}")
