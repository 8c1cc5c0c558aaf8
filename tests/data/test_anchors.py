"""Captions that must keep what the base makes of what stands beside the trigger."""

from lora_diffusion.core.base_model import Cut
from lora_diffusion.data.anchors import Anchors
from lora_diffusion.data.captions import phrase_pattern, priors


class Knows:
    """A text encoder that spells all but a few words in pieces."""

    max_tokens = 75

    def __init__(self, *words):
        self.words = words

    def cuts(self, texts) -> list[Cut | None]:
        return [None for _ in texts]

    def num_tokens(self, texts) -> list[int]:
        return [1 if text in self.words else 2 for text in texts]


def content_anchors(trigger, seed, num_captions, text_limit=None):
    return Anchors(trigger, num_captions, text_limit).of_image("content", "a caption", (), seed)


def look_anchors(caption):
    others = priors(caption, phrase_pattern("zwx"), "seed", 5)
    return Anchors("zwx", 5).of_image("look", caption, others, "seed")


def test_the_base_reads_the_same_without_the_trigger():
    pairs = content_anchors("blob style", "seed", 1, Knows("house", "dog"))
    assert {thing for thing in ("house", "dog") if any(thing in of_base for _, of_base in pairs)} == {"house", "dog"}
    for caption, of_base in pairs:
        assert "blob style" in caption and "blob" not in of_base
        assert set(of_base.split()) <= set(caption.replace(",", "").split())


def test_templates_differ():
    pairs = content_anchors("zwx", "seed", 1)
    thing = dict(zip((of_base.split()[-1] for _, of_base in pairs), pairs, strict=True))
    shapes = {caption.replace(word, "THING") for word, (caption, _) in thing.items()}
    assert len(pairs) == 64 and len(shapes) == 5


def test_few_for_each_of_many_captions_and_others_for_each():
    first, second = (content_anchors("zwx", seed, 1000) for seed in "ab")
    assert len(first) == len(second) == 4 and first != second
    assert content_anchors("zwx", "a", 1000) == first


def test_looks_of_the_image_and_of_others_stay():
    pairs = look_anchors("a zwx animal, noto style")
    assert ("a zwx animal, noto style", "a animal, noto style") in pairs
    others = [pair for pair in pairs if pair[0] != "a zwx animal, noto style"]
    assert others
    for caption, of_base in pairs:
        assert "zwx" in caption and "zwx" not in of_base


def test_a_caption_without_the_trigger_has_no_look_to_leave():
    pairs = look_anchors("a dog, noto style")
    assert all("zwx" in caption for caption, _ in pairs)
