from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lora_diffusion.core.samples import Output, Request
from lora_diffusion.evaluation.progress import pooled_likeness, progress_scorer
from tests.evaluation.test_comparison import GRID, colour_scorers, generate

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
CASES = [replace(case, scoring_caption=word) for case, word in zip(GRID.cases, ("red", "blue"), strict=True)]


def adapted(requests: Sequence[Request]) -> list[Output]:
    return generate([replace(request, weights={"a": 1.0}) for request in requests])


def base(requests: Sequence[Request]) -> list[Output]:
    """Makes violet images, of which some red can be said."""
    return [Output(request, Image.new("RGB", (8, 8), "purple")) for request in requests]


def test_progress_is_0_for_the_base_and_1_for_what_looks_like_the_references() -> None:
    scorer = progress_scorer(GRID, base, colour_scorers(), [RED])
    assert not scorer.uses_captions
    assert scorer.score(base) == 0
    assert scorer.score(adapted) == pytest.approx(1)


def test_progress_sees_whether_the_right_thing_is_shown_where_references_are_captioned() -> None:
    grid = replace(GRID, cases=CASES)

    def right(requests: Sequence[Request]) -> list[Output]:
        return [Output(request, RED if "cat" in request.prompt else BLUE) for request in requests]

    def swapped(requests: Sequence[Request]) -> list[Output]:
        return [Output(request, BLUE if "cat" in request.prompt else RED) for request in requests]

    scorer = progress_scorer(grid, base, colour_scorers(), [RED, BLUE], ["red", "blue"])
    assert scorer.goals.is_matched
    assert scorer.goals.text == pytest.approx(1)
    assert scorer.score(right) == pytest.approx(1)
    assert scorer.score(swapped) == 0


def test_progress_of_a_run_that_was_begun_without_captions_goes_on_so() -> None:
    grid = replace(GRID, cases=CASES)
    captioned = progress_scorer(grid, base, colour_scorers(), [RED, BLUE], ["red", "blue"])
    plain = progress_scorer(grid, base, colour_scorers(), [RED, BLUE])
    assert captioned.without_captions().goals == plain.goals
    assert captioned.without_captions().score(adapted) == plain.score(adapted)


def test_likeness_is_pooled_over_all_pairs() -> None:
    vectors = torch.eye(3)
    assert pooled_likeness(vectors, vectors) == pytest.approx(1 / 3)
    assert pooled_likeness(vectors) == 0
    assert pooled_likeness(vectors[:1]) == 1
