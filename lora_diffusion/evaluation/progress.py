"""How good an adapter is while it is trained: what early stopping calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.evidence import Evidence
from lora_diffusion.evaluation.harness import GenerateLoaded, PromptGrid
from lora_diffusion.evaluation.select import MATCHED, balance, share
from lora_diffusion.scoring.metrics.clip_text import METRIC as CLIP_TEXT
from lora_diffusion.scoring.metrics.match import METRIC as MATCH
from lora_diffusion.scoring.scorers import Scorers

PROGRESS_CASES, PROGRESS_SEEDS = 8, 2
"""How many cases and seeds early stopping looks at."""


@dataclass(frozen=True)
class Goals:
    """What the shares of likeness and text alignment are measured against."""

    base_likeness: float
    reference_likeness: float
    text: float
    is_matched: bool
    """Likeness is that to the references of the same subject (`match`), and not to all of them."""


@dataclass(frozen=True)
class ProgressScorer:
    """Scores an adapter while it is trained, between what the base generates and what is wanted, as `select` does."""

    grid: PromptGrid
    scorers: Scorers
    references: Sequence[Path | Image]
    reference_captions: Sequence[str]
    goals: Goals
    goals_without_captions: Goals
    """What runs were scored by that did not read the captions of the references."""

    @property
    def uses_captions(self) -> bool:
        """Whether the captions of the references decide anything."""
        return self.goals != self.goals_without_captions

    def without_captions(self) -> ProgressScorer:
        """Returns the scorer of a run that was begun without the captions of the references."""
        return replace(self, goals=self.goals_without_captions)

    def score(self, generate: GenerateLoaded) -> float:
        """Returns the balance of likeness and text alignment of what the adapter generates now, 0 to 1."""
        outputs, goals = generate(self.grid.requests()), self.goals
        evidence = _evidence(self, [output.image for output in outputs])
        likeness = MATCH.score(evidence).mean() if goals.is_matched else _pooled(evidence)
        likeness_share = share(likeness, goals.base_likeness, goals.reference_likeness)
        return balance(likeness_share, share(CLIP_TEXT.score(evidence).mean(), 0.0, goals.text))


def progress_scorer(
    grid: PromptGrid,
    generate: GenerateLoaded,
    scorers: Scorers,
    references: Sequence[Path | Image],
    reference_captions: Sequence[str] = (),
) -> ProgressScorer:
    """Returns the scorer of early stopping, after looking at what the base generates.

    Args:
        grid: the first concept prompts of it, and its first seeds, are used.
        generate: generates with the base alone.
        scorers: the CLIP.
        references: real images of what is trained; one by itself is taken as the goal.
        reference_captions: as in Evidence. With them the full share of text alignment is what the references reach,
            else what the base reaches with the control prompts: it generates what it knows as well as it can.
    """
    cases = [case for case in grid.cases if not case.is_control][:PROGRESS_CASES]
    grid = replace(grid, cases=cases, seeds=grid.seeds[:PROGRESS_SEEDS])
    scorer = ProgressScorer(grid, scorers, references, reference_captions, *[Goals(0.0, 0.0, 0.0, False)] * 2)
    images = [output.image for output in generate(grid.requests())]
    base_likeness = _pooled(_evidence(scorer, images))
    match = MATCH.score(_evidence(scorer, images)) if reference_captions else None
    controls = [output.image for output in generate(grid.requests(control=True))]
    base_text = CLIP_TEXT.score(_evidence(scorer, controls)).mean()
    evidence = _evidence(scorer, ())
    plain = Goals(base_likeness, pooled_likeness(scorers.see("clip", references)), base_text, False)
    text = CLIP_TEXT.reference_score(evidence)
    goals = replace(plain, text=text) if text is not None and text > 0 else plain
    reference_match = MATCH.reference_score(evidence)
    if match and reference_match and (~match.values.isnan()).float().mean() >= MATCHED:
        goals = replace(goals, base_likeness=match.mean(), reference_likeness=reference_match, is_matched=True)
    return replace(scorer, goals=goals, goals_without_captions=plain)


def _evidence(scorer: ProgressScorer, images: Sequence[Image]) -> Evidence:
    captions, references = scorer.reference_captions, scorer.references
    return scorer.grid.evidence(images, references=references, reference_captions=captions, scorers=scorer.scorers)


def _pooled(evidence: Evidence) -> float:
    scorers = evidence.scorers
    return pooled_likeness(scorers.see("clip", evidence.images), scorers.see("clip", evidence.references))


def pooled_likeness(vectors: Tensor, others: Tensor | None = None) -> float:
    """Returns the mean cosine over all pairs at once; 1 for a single vector without others.

    `clip_image` takes the mean of each image first, which differs in the last bits; runs that are stopped and continued
    compare their scores with earlier ones, so early stopping stays with this.

    Args:
        vectors: [num, dim], unit vectors.
        others: [num_others, dim], unit vectors; None takes the pairs of `vectors`, each without itself.
    """
    if others is not None:
        return (vectors @ others.T).mean().item()
    if len(vectors) == 1:
        return 1.0
    is_pair = ~torch.eye(len(vectors), dtype=torch.bool)
    return (vectors @ vectors.T)[is_pair].mean().item()
