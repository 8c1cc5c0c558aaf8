"""Whether images show all concepts that were composed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from lora_diffusion.core.errors import ModelError
from lora_diffusion.core.evidence import Concept, Evidence, Scores
from lora_diffusion.data.captions import phrase_pattern
from lora_diffusion.data.images import open_rgb
from lora_diffusion.scoring.metrics._shared import Defaults, mean_of_pairs
from lora_diffusion.scoring.scorers import Scorers
from lora_diffusion.scoring.style_probe import StyleProbe, fit_to_images

_SIDE = 0.6
"""Of the parts in which a subject is looked for, as a share of the image: two subjects lie beside each other."""
_PLACES = (0.0, 0.5, 1.0)


class ConceptsShown(Defaults):
    """1 where every concept passes its own threshold, else 0; of prompts that ask for all of them.

    A style is seen by the probe of the metric `style`; a subject by the mean cosine with its references in CLIP space,
    in the whole image or a part of it. A threshold is half way from what the base alone scores with the same prompts
    to what the concept can score: its references (each against the others), or if that is less, its adapter alone.
    """

    name = "concepts_shown"
    meaning = "share of images in which every concept passes its own threshold"
    needs = frozenset({"concepts", "base_images"})

    def score(self, evidence: Evidence) -> Scores:
        """Returns 0 or 1 for each image; NaN where the prompt does not ask for all concepts, or one cannot be seen."""
        asked = [_asks_for_all(prompt, evidence.concepts) for prompt in evidence.prompts]
        values = torch.full((len(asked),), torch.nan)
        shown, remarks = torch.ones(sum(asked), dtype=torch.bool), []
        for concept in evidence.concepts:
            try:
                detector = _Detector(concept, evidence.scorers)
            except ModelError as error:
                return Scores(values, warnings=[f"concepts_shown is not measured: {error}"])
            base = detector.see(_chosen(evidence.base_images, asked)).mean().item()
            alone = [detector.see(_chosen(images, asked)).mean().item() for images in concept.alone]
            full = min(detector.reference_score, max(alone, default=1.0))
            if full <= base:
                note = f"{concept.trigger} scores {full:.3f} at best, and the base alone {base:.3f}"
                return Scores(values, warnings=[f"concepts_shown is not measured: {note}."])
            shown &= detector.see(_chosen(evidence.images, asked)) > (base + full) / 2
            remarks.append(f"{concept.trigger} above {(base + full) / 2:.3f} (base {base:.3f}, at best {full:.3f})")
        values[torch.tensor(asked)] = shown.float()
        return Scores(values, remark=", ".join(remarks))


class _Detector:
    """Says how surely images show a concept."""

    def __init__(self, concept: Concept, scorers: Scorers) -> None:
        """Fits the probe of a style.

        Raises:
            ModelError: it cannot be told from what the base draws.
        """
        self._concept, self._scorers = concept, scorers
        self._probe = _style_probe(concept, scorers) if concept.is_style else None

    @property
    def reference_score(self) -> float:
        """What real images score that are not among those they are compared with; 1 where there is but one."""
        if self._probe:
            return self._probe.held_out_probability()
        references = self._scorers.see("clip", self._concept.references)
        return mean_of_pairs(references) if len(references) > 1 else 1.0

    def see(self, images: Sequence[Path | Image]) -> Tensor:
        """Returns one score for each image, [num_images]."""
        if self._probe:
            return self._probe.probability(self._scorers.look("clip", images))
        references = self._scorers.see("clip", self._concept.references)
        views = [view for image in images for view in _views(image)]
        vectors = self._scorers.see("clip", views)
        return (vectors @ references.T).mean(dim=1).reshape(len(images), -1).amax(dim=1)


def _style_probe(concept: Concept, scorers: Scorers) -> StyleProbe:
    probe = fit_to_images(scorers, concept.references, concept.base_references)
    if probe is None or not probe.is_sure:
        num = len(concept.base_references)
        raise ModelError(f"the style {concept.trigger} cannot be told from that of the base with {num} references.")
    return probe


def _views(image: Path | Image) -> list[Image]:
    """Returns the image and nine overlapping parts of it."""
    whole = open_rgb(image) if isinstance(image, Path) else image
    width, height = (round(_SIDE * length) for length in whole.size)
    corners = (
        (round(x * (whole.width - width)), round(y * (whole.height - height))) for x, y in product(_PLACES, repeat=2)
    )
    return [whole, *(whole.crop((left, top, left + width, top + height)) for left, top in corners)]


def _asks_for_all(prompt: str, concepts: Sequence[Concept]) -> bool:
    return all(phrase_pattern(concept.trigger).search(prompt) for concept in concepts)


def _chosen(images: Sequence[Path | Image], chosen: Sequence[bool]) -> list[Path | Image]:
    return [image for image, is_chosen in zip(images, chosen, strict=True) if is_chosen]


METRIC = ConceptsShown()
