"""How good an adapter is while it is trained, from a few pictures: the balance by which `select` chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.samples import Output, Request
from lora_diffusion.evaluation.results import Case
from lora_diffusion.evaluation.select import balance, share
from lora_diffusion.evaluation.suites import PLAIN_KINDS
from lora_diffusion.scoring.clip import Clip

NUM_CASES = 8
NUM_SEEDS = 2
Draw = Callable[[Sequence[Request]], Sequence[Output]]


@dataclass(frozen=True)
class Progress:
    """Scores pictures between what the base draws and what is wanted."""

    clip: Clip
    requests: tuple[Request, ...]
    meanings: tuple[str, ...]
    """What each picture should show, in words that the scorer knows."""
    references: Tensor
    """[pictures, dim], unit vectors."""
    base_likeness: float
    real_likeness: float
    base_text: float
    """Text alignment of the base's pictures of the plain prompts: it draws what it knows as well as it can."""

    def score(self, draw: Draw) -> float:
        """Returns the balance of likeness and text alignment of what the adapter draws now, 0 to 1."""
        likeness, text = _look(self.clip, draw(self.requests), self.meanings, self.references)
        likeness_share = share(likeness, self.base_likeness, self.real_likeness)
        return balance(likeness_share, share(text, 0.0, self.base_text))


def start(
    clip: Clip,
    cases: Sequence[Case],
    seeds: Sequence[int],
    references: Sequence[Path | Image],
    template: Request,
    draw: Draw,
) -> Progress:
    """Returns the scorer, after looking at what the base draws.

    Args:
        clip: scores the pictures.
        cases: the first that ask for what is trained are used.
        seeds: the first are used.
        references: real pictures of what is trained; one by itself is taken as the goal.
        template: steps, guidance and negative prompt.
        draw: draws with the base alone.
    """
    asked = [case for case in cases if case.kind not in PLAIN_KINDS][:NUM_CASES]
    drawn = [(case, seed) for case in asked for seed in seeds[:NUM_SEEDS]]
    requests = tuple(replace(template, prompt=case.prompt, seed=seed) for case, seed in drawn)
    plain = [replace(template, prompt=case.plain, seed=seed) for case, seed in drawn]
    meanings = tuple(case.meaning for case, _ in drawn)
    vectors = clip.encode_images(references)
    base_likeness, _ = _look(clip, draw(requests), meanings, vectors)
    _, base_text = _look(clip, draw(plain), meanings, vectors)
    return Progress(clip, requests, meanings, vectors, base_likeness, _alike(vectors), base_text)


def _look(clip: Clip, outputs: Sequence[Output], meanings: Sequence[str], references: Tensor) -> tuple[float, float]:
    """Returns mean likeness to the references and mean text alignment."""
    pictures = clip.encode_images([output.image for output in outputs])
    texts = clip.encode_texts(meanings)
    return (pictures @ references.T).mean().item(), (pictures * texts).sum(dim=1).mean().item()


def _alike(vectors: Tensor) -> float:
    """Returns the mean likeness of the references to each other."""
    if len(vectors) == 1:
        return 1.0
    others = ~torch.eye(len(vectors), dtype=torch.bool)
    return (vectors @ vectors.T)[others].mean().item()
