"""What several metrics have in common: the usual attributes, error rates of texts, likeness to references."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lora_diffusion.core.evidence import Evidence, Scores
from lora_diffusion.core.extras import require


class Defaults:
    """A metric of the images of concept prompts, with CLIP, higher is better, without baseline and reference."""

    higher_is_better = True
    outputs = "concept"
    needs: frozenset[str] = frozenset()
    scorers: tuple[str, ...] = ("clip",)
    per_prompt = False

    def random_baseline(self, evidence: Evidence) -> float | None:
        """Returns None: unrelated images say nothing."""

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns None: the references say nothing."""


def references_with_captions(evidence: Evidence) -> Evidence | None:
    """Returns the captioned references as the images to score, with their captions; None where there are none."""
    pairs = [pair for pair in zip(evidence.references, evidence.reference_captions, strict=False) if pair[1]]
    if not pairs:
        return None
    images, captions = zip(*pairs, strict=True)
    return Evidence(images, captions, range(len(images)), scorers=evidence.scorers)


class CaptionDefaults(Defaults):
    """A metric of images and their scoring captions; references are scored with their own captions."""

    @abstractmethod
    def score(self, evidence: Evidence) -> Scores:
        """Returns one value for each image."""

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean score of the references with their own captions, or None where they have none."""
        references = references_with_captions(evidence)
        return self.score(references).mean() if references else None


class TextDefaults(Defaults):
    """A metric of texts against their targets, without a model."""

    outputs = "texts"
    needs = frozenset({"answers", "targets"})
    scorers = ()


class ErrorRate(TextDefaults):
    """Edits divided by the length of the target. Case and punctuation count: make both texts alike before."""

    higher_is_better = False
    name: ClassVar[str]
    counter: ClassVar[str]
    """The function of jiwer that counts."""

    def score(self, evidence: Evidence) -> Scores:
        """Returns one rate for each text; `Scores.mean` is the rate of the whole corpus."""
        count = getattr(require("jiwer", f"The metric {self.name}"), self.counter)
        edits, lengths = [], []
        for target, answer in zip(evidence.targets, evidence.answers, strict=True):
            counts = count(target, answer)
            edits.append(counts.substitutions + counts.deletions + counts.insertions)
            lengths.append(counts.hits + counts.substitutions + counts.deletions)
        # An empty target counts as one word, so that words in silence are errors.
        weights = torch.tensor(lengths, dtype=torch.float32).clamp(min=1)
        return Scores(torch.tensor(edits, dtype=torch.float32) / weights, weights=weights)


def mean_of_pairs(vectors: Tensor) -> float:
    """Returns the mean cosine of two of these unit vectors, [num, dim], at least two."""
    num = len(vectors)
    pairs = (vectors @ vectors.T).fill_diagonal_(0)
    return float(pairs.sum().item() / (num * (num - 1)))


class MeanLikeness(Defaults):
    """Mean cosine of each image with all references, in the space of one scorer."""

    needs = frozenset({"references"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns one mean cosine for each image."""
        (scorer,) = self.scorers
        references = evidence.scorers.see(scorer, evidence.references)
        return Scores((evidence.scorers.see(scorer, evidence.images) @ references.T).mean(dim=1))

    def reference_score(self, evidence: Evidence) -> float | None:
        """Returns the mean cosine of two references, or None if there is but one."""
        (scorer,) = self.scorers
        references = evidence.scorers.see(scorer, evidence.references)
        return mean_of_pairs(references) if len(references) > 1 else None

    def of_references(self, evidence: Evidence) -> Scores:
        """Returns the mean cosine of each reference with the others; 0 if it has none."""
        (scorer,) = self.scorers
        references = evidence.scorers.see(scorer, evidence.references)
        others = (references @ references.T).fill_diagonal_(0)
        return Scores(others.sum(dim=1) / max(1, len(references) - 1))
