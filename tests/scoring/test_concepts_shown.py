"""The metric of compositions on planted images: drawings of one concept, of both, and of neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from lora_diffusion.core.evidence import Concept, Evidence
from lora_diffusion.core.files import shipped_path
from lora_diffusion.scoring.metrics.concepts_shown import METRIC
from lora_diffusion.scoring.scorers import Scorers

DATASETS = shipped_path("datasets")
OCTOPUS = sorted((DATASETS / "octopus" / "train").glob("*.png"))
KNOWN = DATASETS / "emoji-questions" / "known"
BALL = [KNOWN / f"pool-8-ball-{style}.png" for style in ("flat", "fxemoji")]
OTHERS = [KNOWN / f"{name}.png" for name in ("cheese-wedge-fluent", "duck-twemoji", "tulip-flat", "sailboat-flat")]


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return Scorers({"clip": "builtin:emoji-clip"})


def beside(left: Path, right: Path) -> Image.Image:
    """Two subjects in one image."""
    sheet = Image.new("RGB", (128, 128), "white")
    for index, path in enumerate((left, right)):
        sheet.paste(Image.open(path).convert("RGB").resize((64, 64)), (64 * index, 32))
    return sheet


def in_lines(path: Path, folder: Path) -> Path:
    """The same thing with sharp outlines."""
    image, target = Image.open(path).convert("RGB"), folder / f"lines-{path.name}"
    Image.blend(image, image.filter(ImageFilter.CONTOUR), 0.5).save(target)
    return target


def share(images: list[Path | Image.Image], base: list[Path | Image.Image], concepts: list[Concept]) -> float:
    prompts = [f"{' and '.join(concept.trigger for concept in concepts)} {index}" for index in range(len(images))]
    scorers = Scorers({"clip": "builtin:emoji-clip"})
    return METRIC.score(
        Evidence(images, prompts, prompts=prompts, base_images=base, concepts=concepts, scorers=scorers)
    ).mean()


def test_two_subjects_are_seen_only_where_both_are_there() -> None:
    concepts = [Concept("zwx", False, OCTOPUS[:3]), Concept("qvb", False, BALL)]
    base: list[Path | Image.Image] = [beside(OTHERS[i], OTHERS[(i + 1) % 4]) for i in range(4)]
    new = OCTOPUS[3:]
    both = [beside(new[i % 2], BALL[i // 2]) for i in range(4)]
    first = [beside(new[i % 2], OTHERS[i]) for i in range(4)]
    second = [beside(OTHERS[i], BALL[i % 2]) for i in range(4)]
    assert share(both, base, concepts) == 1
    assert share(first, base, concepts) == share(second, base, concepts) == share(base, base, concepts) == 0


def test_subject_in_a_style_is_seen_only_where_both_are_there(tmp_path: Path) -> None:
    plain = sorted(KNOWN.glob("*.png"))[::3][:16]
    style = Concept("lines", True, [in_lines(path, tmp_path) for path in plain], base_references=plain)
    concepts = [Concept("zwx", False, OCTOPUS[:3]), style]
    base: list[Path | Image.Image] = list(OTHERS)
    new: list[Path | Image.Image] = [*OCTOPUS[3:]]
    assert share([in_lines(path, tmp_path) for path in OCTOPUS[3:]], base[:2], concepts) == 1
    assert share(new, base[:2], concepts) == 0
    assert share([in_lines(path, tmp_path) for path in OTHERS], base, concepts) == 0
    assert share(base, base, concepts) == 0


def test_prompts_that_ask_for_one_concept_are_left_out(scorers: Scorers) -> None:
    prompts = ["zwx and qvb", "zwx"]
    concepts = [Concept("zwx", False, OCTOPUS), Concept("qvb", False, BALL)]
    made = Evidence(
        [OCTOPUS[0], OCTOPUS[0]], prompts, prompts=prompts, base_images=OTHERS[:2], concepts=concepts, scorers=scorers
    )
    values = METRIC.score(made).values
    assert values[0] == 0
    assert values[1].isnan()


def test_an_adapter_that_shows_little_alone_lowers_the_threshold_and_one_that_shows_nothing_ends_it(
    scorers: Scorers,
) -> None:
    def scores(*alone: Path) -> object:
        concept = Concept("zwx", False, OCTOPUS[:3], alone=[alone] if alone else ())
        made = Evidence(alone or OCTOPUS[3:4], ["zwx"], prompts=["zwx"], base_images=OTHERS[:1], concepts=[concept])
        return METRIC.score(type(made)(**{**vars(made), "scorers": scorers}))

    assert "above" in scores().remark  # type: ignore[attr-defined]
    assert scores(OCTOPUS[3]).remark  # type: ignore[attr-defined]
    assert "not measured: zwx scores" in scores(OTHERS[0]).warnings[0]  # type: ignore[attr-defined]
