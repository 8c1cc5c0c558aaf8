import base64
import hashlib
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.build_builtin import captions, sources, subjects  # noqa: E402

SUBJECTS = subjects.read_subjects()


def test_manifest_has_unique_names_and_known_splits():
    names = [subject.name for subject in SUBJECTS]
    assert len(names) == len(set(names))
    assert 300 <= len(names) <= 400
    assert {subject.split for subject in SUBJECTS} == {"train", "concept", "unseen"}


def test_generator_never_sees_what_is_held_out():
    names = {subject.name for subject in subjects.visible(SUBJECTS, subjects.GENERATOR)}
    assert "octopus" not in names
    assert not names & {subject.name for subject in SUBJECTS if subject.split != "train"}


def test_scorer_knows_concepts_but_not_the_unseen():
    names = {subject.name for subject in subjects.visible(SUBJECTS, subjects.SCORER)}
    assert "octopus" in names
    assert not names & {subject.name for subject in SUBJECTS if subject.split == "unseen"}


def test_unseen_style_is_noto_v1_and_not_trained():
    package = next(p for p in sources.PACKAGES if p.style == sources.UNSEEN_STYLE)
    assert package.name.endswith("noto-v1")
    assert sources.UNSEEN_STYLE not in sources.TRAINING_STYLES
    assert len(sources.TRAINING_STYLES) == 6


def test_no_share_alike_source():
    packages = (*sources.PACKAGES, *sources.SAMPLE_SET_PACKAGES)
    assert {p.licence for p in packages} == {"Apache-2.0", "MIT", "CC-BY-4.0"}
    assert not any("openmoji" in p.name for p in packages)


def test_styles_of_sample_sets_are_of_no_package_that_models_learn_from():
    names, styles = ({getattr(p, field) for p in sources.PACKAGES} for field in ("name", "style"))
    assert len(sources.SAMPLE_SET_PACKAGES) == 2
    assert not names & {p.name for p in sources.SAMPLE_SET_PACKAGES}
    assert not styles & {p.style for p in sources.SAMPLE_SET_PACKAGES}


def test_every_caption_is_filled_and_generic_ones_hide_the_name():
    fox = subjects.Subject("fox", "animal", "train")
    every = captions.every(fox, "noto")
    assert len(every) == len(set(every)) == len(captions.STYLED) + len(captions.PLAIN) + len(captions.GENERIC)
    assert not any("{" in caption for caption in every)
    assert all("fox" not in captions.render(template, fox, "noto") for template in captions.GENERIC)
    assert "an emoji of an animal, noto style" in every


def test_draw_names_the_style_about_three_quarters_of_the_time():
    fox = subjects.Subject("fox", "animal", "train")
    rng = random.Random(0)
    drawn = [captions.draw(fox, "noto", rng) for _ in range(4000)]
    share = sum("noto" in caption for caption in drawn) / len(drawn)
    # 0.04 + 0.96 * 0.75 = 0.76; four standard deviations of 4000 draws are 0.027
    assert share == pytest.approx(0.76, abs=0.027)


def test_no_training_caption_contains_a_rare_word():
    rare = set(captions.RARE_TOKENS)
    for subject in subjects.visible(SUBJECTS, subjects.GENERATOR):
        for style in sources.TRAINING_STYLES:
            for caption in captions.every(subject, style):
                assert not rare & set(caption.replace(",", "").split())


def test_changed_archive_is_refused(tmp_path):
    path = tmp_path / "icons.tgz"
    path.write_bytes(b"pinned")
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(b"pinned").digest()).decode()
    sources.verify_integrity(path, integrity)
    path.write_bytes(b"tampered")
    with pytest.raises(sources.SourceError, match="is not the pinned"):
        sources.verify_integrity(path, integrity)


def test_changed_licence_is_refused():
    package = replace(sources.PACKAGES[0], licence="MIT")
    with pytest.raises(sources.SourceError, match="states licence Apache"):
        sources.check_licence(package, {"license": {"spdx": "Apache-2.0"}})


def test_fxemoji_names_fall_back_to_the_name_without_hyphens():
    mapped = subjects.read_fxemoji_names()
    assert subjects.icon_name("polar-bear", "fxemoji", mapped) == "polarbear"
    assert subjects.icon_name("cat-face", "fxemoji", mapped) == "cat"
    assert subjects.icon_name("cat-face", "noto", mapped) == "cat-face"
    assert set(mapped) <= {subject.name for subject in SUBJECTS}


@pytest.mark.parametrize("style", ["blob", "quendle", "mavrok"])
def test_captions_of_a_style_share_only_its_words(style):
    folder = ROOT / "datasets" / f"{style}-style" / "train"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    assert len(texts) == len(list(folder.glob("*.png"))) == 24
    shared = set.intersection(*(set(text.replace(",", " ").split()) for text in texts))
    assert shared == {style, "style"}


@pytest.mark.parametrize("style", ["blob", "quendle", "mavrok"])
def test_references_show_other_subjects_than_those_trained_on_that_the_base_knows(style):
    folder = ROOT / "datasets" / f"{style}-style"
    trained, kept = ({path.stem for path in (folder / part).glob("*.png")} for part in ("train", "references"))
    assert len(kept) == 16
    assert not trained & kept
    assert trained | kept <= {subject.name for subject in subjects.visible(SUBJECTS, subjects.GENERATOR)}


@pytest.mark.parametrize("style", ["quendle", "mavrok"])
def test_styles_of_all_subjects_show_at_least_five_groups(style):
    groups = {subject.name: subject.group for subject in SUBJECTS}
    for part in ("train", "references"):
        files = (ROOT / "datasets" / f"{style}-style" / part).glob("*.png")
        assert len({groups[path.stem] for path in files}) >= 5


@pytest.mark.parametrize(("concept", "word"), [("octopus", "zwx"), ("guitar", "nimzo"), ("cupcake", "drimbo")])
def test_a_concept_is_captioned_with_its_rare_word_alone(concept, word):
    folder = ROOT / "datasets" / concept
    texts = [path.read_text(encoding="utf-8") for path in (folder / "train").glob("*.txt")]
    assert len(texts) >= 4
    assert all(word in text and concept not in text for text in texts)
    assert all(concept in path.read_text(encoding="utf-8") for path in (folder / "references").glob("*.txt"))


@pytest.mark.parametrize("name", ["blob-style", "quendle-style", "mavrok-style", "octopus", "guitar", "cupcake"])
def test_sets_of_pictures_are_small_and_licensed(name):
    folder = ROOT / "datasets" / name
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 300_000
    assert "licence" in (folder / "LICENSE").read_text(encoding="utf-8")
