from __future__ import annotations

import pytest

from lora_diffusion.core.evidence import Evidence
from lora_diffusion.core.files import shipped_path
from lora_diffusion.evaluation.references import read_captions
from lora_diffusion.evaluation.suites import read_cases
from lora_diffusion.scoring.metrics.match import METRIC as MATCH
from lora_diffusion.scoring.scorers import Scorers
from lora_diffusion.scoring.subjects import partners

BLOB = shipped_path("datasets") / "blob-style" / "references"


@pytest.mark.parametrize(
    ("captions", "references", "paired"),
    [
        (["a picture of a cat"], ["cat emoji", "an emoji of a dog"], [[0]]),
        (["a cat on a mat", "a dog"], ["on a mat, a cat", "a Dog.", "dog"], [[0], [1, 2]]),
        (["a cat", "a dog in the snow"], ["a cat", "a dog"], [[0], []]),
        (["a red cat", "a red dog"], ["a red cat", "a blue cat"], [[0], []]),
        # All prompts say the same of how it looks, which no reference does.
        (["a shiny cat", "a shiny dog"], ["a cat", "a dog"], [[0], [1]]),
        # One subject in several styles: all references show it.
        (["an octopus, noto style", "a picture of an octopus"], ["an octopus, blob style", "octopus"], [[0, 1]] * 2),
        (["animal, noto style", "animal in flat style"], ["an animal, noto style", "flat style animal"], [[0, 1]] * 2),
        (["a cat", "a dog"], ["", "a dog"], [[], [1]]),
        (["猫"], ["犬", "猫"], [[1]]),
    ],
)
def test_captions_name_the_same_subject_if_their_telling_words_are_equal(
    captions: list[str], references: list[str], paired: list[list[int]]
) -> None:
    assert partners(captions, references) == paired


def test_prompts_of_a_shipped_suite_find_the_references_of_its_data() -> None:
    images = sorted(BLOB.glob("*.png"))
    captions = read_captions(str(BLOB), images, ["blob style"], "--references")
    cases = [case for case in read_cases("emoji-style", ["blob style"]) if not case.is_control]
    assert captions[1] == "anxious face with sweat"
    paired = partners([case.scoring_caption for case in cases], captions)
    assert [images[index].stem for (index,) in paired] == [
        case.scoring_caption.removeprefix("an emoji of ").removeprefix("a ").removeprefix("an ").replace(" ", "-")
        for case in cases
    ]


def test_match_leaves_out_what_no_reference_shows_and_says_so() -> None:
    images = sorted(BLOB.glob("*.png"))[:3]
    scorers = Scorers({"clip": "builtin:emoji-clip"})
    references = {"references": images, "reference_captions": ["a cat", "a dog", "a frog"], "scorers": scorers}
    scores = MATCH.score(Evidence([images[1], images[2], images[0]], ["a dog", "a dog", "a rose"], **references))
    assert scores.values[0].item() == pytest.approx(1, abs=1e-4)
    assert scores.values[1].item() < 0.97
    assert scores.values[2].isnan()
    assert scores.mean() == pytest.approx(scores.values[:2].mean().item())
    assert "leaves out 1 of 2 prompt texts" in scores.warnings[0]
    none = MATCH.score(Evidence(images[:1], ["a rose"], **references))
    assert "not measured" in none.warnings[0]
    assert MATCH.reference_score(Evidence(images[:1], ["a rose"], **references)) is None


def test_match_of_references_is_that_of_two_of_one_subject_where_there_are_two() -> None:
    images, scorers = sorted(BLOB.glob("*.png"))[:3], Scorers({"clip": "builtin:emoji-clip"})

    def reference_score(*captions: str) -> float | None:
        evidence = Evidence((), ["a dog", "a cat"], references=images, reference_captions=captions, scorers=scorers)
        return MATCH.reference_score(evidence)

    vectors = scorers.see("clip", images)
    assert reference_score("a dog", "a dog", "a cat") == pytest.approx((vectors[0] @ vectors[1]).item(), abs=1e-5)
    assert reference_score("a dog", "a frog", "a cat") == 1
