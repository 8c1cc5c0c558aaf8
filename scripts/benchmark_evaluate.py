"""Measures what scoring costs against torchmetrics, and what an evaluation costs besides drawing and scoring.

python scripts/benchmark.py evaluate                # 2,000 pictures
python scripts/benchmark.py evaluate --num 500 --repeats 1

Both arms read the same PNG files, score them with the same CLIP in batches of the same size, and take turns:

    ours            evaluation.metrics.clip_text
    torchmetrics    CLIPScore, which gets the pictures as uint8 tensors
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_diffusion.core.files import shipped_path
from lora_diffusion.core.types import Evidence
from lora_diffusion.evaluation.clip import BUILTIN, Clip, load_clip
from lora_diffusion.evaluation.encoding import BATCH
from lora_diffusion.evaluation.metrics.clip_text import METRIC as CLIP_TEXT
from lora_diffusion.evaluation.scorers import Scorers

_SIDES = (64, 64, 64, 96)
"""Most pictures have the size that the CLIP wants, as generated ones have; some must be scaled."""
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

    from lora_diffusion.evaluation.clip import _source

    architecture, tag = _source(name, open_clip.list_models())
    model, _, transform = open_clip.create_model_and_transforms(architecture, pretrained=tag)
    return OpenClipModel(model.eval()), OpenClipProcessor(transform, open_clip.get_tokenizer(architecture))


def make_pictures(folder: Path, num: int, sides: Sequence[int] = _SIDES) -> tuple[list[Path], list[str]]:
    """Writes crops of the sample sets as PNG; returns the files and what each shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = sorted(shipped_path("datasets").rglob("*.png"))
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
