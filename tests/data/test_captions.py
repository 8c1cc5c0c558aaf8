from __future__ import annotations

import re

import pytest

from lora_diffusion.data.captions import phrase_pattern, priors, without_trigger, words_pattern


@pytest.mark.parametrize(
    ("caption", "phrase", "prior"),
    [
        ("an emoji of a cat, blob style", "blob style", "an emoji of a cat"),
        ("an emoji of a cat, in Blob  Style", "blob style", "an emoji of a cat"),
        ("blob style, a cat", "blob style", "a cat"),
        ("a cat, blob style, red", "blob style", "a cat, red"),
        ("a photo of sks dog on the beach", "sks", "a photo of dog on the beach"),
        ("a photo of sks dog on the beach", "sks dog", "a photo on the beach"),
        ("blob style of a cat", "blob style", "a cat"),
        ("a blob style picture of a cat", "blob style", "a picture of a cat"),
        ("sks dogs", "sks dog", "sks dogs"),
        ("sks dog", "sks dog", ""),
        ("a cat. blob style.", "blob style", "a cat.."),
    ],
)
def test_a_phrase_is_cut_with_what_only_led_to_it(caption, phrase, prior):
    assert without_trigger(caption, phrase_pattern(phrase)) == prior


def test_found_words_are_cut_wherever_they_stand():
    pattern = words_pattern("style of zwx")
    assert without_trigger("a cat in the style of zwx", pattern) == "a cat"
    assert without_trigger("zwx hat of a man, flat style", pattern) == "hat of a man, flat"


@pytest.mark.parametrize(
    ("caption", "trigger", "prior"),
    [
        ("赛博朋克猫", "赛博朋克", "猫"),
        ("ねこのイラスト", "イラスト", "ねこの"),
        ("zwx_dog", "zwx", "dog"),
        ("a dog, blob_style", "blob_style", "a dog"),
    ],
)
@pytest.mark.parametrize("pattern", [phrase_pattern, words_pattern])
def test_triggers_in_scripts_without_spaces_and_beside_underscores(caption, trigger, prior, pattern):
    assert without_trigger(caption, pattern(trigger)) == prior


def test_a_trigger_is_no_piece_of_a_word():
    assert not phrase_pattern("zwx").search("zwxy dog")


@pytest.mark.parametrize("pattern", [phrase_pattern, words_pattern])
def test_priors_name_other_things_in_place_of_the_trigger(pattern):
    cut, *others = priors("a photo of sks dog on the beach", pattern("sks dog"), "seed", 5)
    assert cut == "a photo on the beach"
    assert len(set(others)) == len(others) == 12
    for text in others:
        assert re.fullmatch(r"a photo of (?!dog|sks)[a-z]+ on the beach", text), text


def test_priors_are_few_where_there_are_many_captions():
    pattern = phrase_pattern("zwx")
    assert (
        priors("a zwx", pattern, "1", 500) == priors("a zwx", pattern, "1", 100) != priors("a zwx", pattern, "2", 500)
    )
    assert [len(priors("a zwx", pattern, "1", num)) for num in (1, 2, 500)] == [65, 33, 5]
    assert priors("a cat", pattern, "1", 1) == ()
