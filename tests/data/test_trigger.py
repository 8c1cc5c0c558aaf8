from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_diffusion.data.captions import phrase_pattern, priors, words_pattern
from lora_diffusion.data.trigger import Trigger, find

ROOT = Path(__file__).parents[2]
MIKU = r"hatsune miku \(vocaloid\)"


@pytest.mark.parametrize(
    ("captions", "trigger"),
    [
        (["an emoji of a cat, blob style", "a dog in blob style", "Blob  style hat"], "blob style"),
        (["a photo of sks dog", "sks dog on a beach"], "sks dog"),
        (["a cat in the style of zwx", "style of zwx, a dog"], "style of zwx"),
        (["zwx cat, flat", "a flat dog, zwx"], "zwx"),
        (["an emoji of a cat", "a picture of a dog"], ""),
        (["a cat, noto style", "a dog, blob style"], ""),
        (["a cat"], ""),
        (["a zwx cat", ""], ""),
        ([], ""),
        (["Ägypten, eine Katze", "ägypten bei Nacht"], "Ägypten"),
        # tags
        (["1girl, solo, zorgchan, red hair, smile", "1girl, solo, zorgchan", "zorgchan, 1girl, solo"], "zorgchan"),
        (["masterpiece, best quality, 1girl", "masterpiece, best quality, 1girl, solo"], ""),
        (["score_9, score_8_up, zorgchan, 1girl", "score_9, score_8_up, zorgchan, solo"], "zorgchan"),
        (["best quality, (zorgchan:1.2), red hair", "best quality, (zorgchan:1.2)"], "zorgchan"),
        (["((zorgchan)), smile", "((zorgchan)), frown"], "zorgchan"),
        ([f"1girl, {MIKU}, blue", f"{MIKU}, smile"], MIKU),
        (["1girl, hatsune_miku, looking_at_viewer", "hatsune_miku, looking_at_viewer, smile"], "hatsune_miku"),
        (["zorg_chan, 1girl", "zorg chan, solo", "zorg-chan, smile"], "zorg_chan"),
        (["zorgchan, blorpy, 1girl", "blorpy, zorgchan, solo"], "zorgchan, blorpy"),
        (["a <lora:zurp:1> zorg cat", "<lora:zurp:1> zorg dog"], "zorg"),
        # sentences
        (["a photo of a dog", "a photo of a dog on grass", "a photo of a dog running"], ""),
        (["a photo of TOK man", "TOK man walking"], "TOK man"),
        (["The image shows zorg dog on the grass. It is warm.", "The image shows zorg dog. It is warm."], "zorg dog"),
        (["watercolor style cat", "watercolor style dog"], ""),
        # other scripts and signs
        (["\uff11girl\uff0czorgchan\uff0c微笑", "zorgchan\uff0c坐着\uff0c微笑"], "zorgchan"),
        (["佐格酱\uff0c一个女孩\uff0c微笑", "一个女孩、佐格酱、坐着\uff0c微笑"], "佐格酱"),
        (["佐格酱在公园里", "佐格酱坐在沙发上", "一张佐格酱的照片"], "佐格酱"),
        (["ゾルグちゃんの写真", "ゾルグちゃんが座っている"], "ゾルグちゃん"),
        (["조르그짱이 앉아있다", "조르그짱의 사진"], "조르그짱"),
        (["zorg风格的猫", "zorg风格的狗"], "zorg"),
        (["зорг стиль, кот", "собака, зорг стиль"], "зорг стиль"),
        (["девушка, улыбка", "девушка, улыбка, волосы"], ""),
    ],
)
def test_the_rarest_words_that_all_share_are_the_trigger(captions, trigger):
    shared = find(captions)
    assert shared.trigger.text == trigger
    assert all(shared.trigger.is_in(caption) for caption in captions)


@pytest.mark.parametrize(("name", "trigger"), [("blob-style", "blob style"), ("octopus", "zwx")])
def test_trigger_of_the_sample_sets(name, trigger):
    folder = ROOT / "datasets" / name / "train"
    assert find([file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]).trigger.text == trigger


def test_what_else_is_shared_is_told():
    assert find(["1girl, solo, zorgchan, red hair", "zorgchan, 1girl, solo"]).common == ("1girl", "solo")
    assert find(["score_9, a dog", "a dog, score_9"]).common == ("score_9", "a dog")
    assert find(["johnsmith walking", "johnsmith sitting"])[:3] == (Trigger(("johnsmith",)), (), True)
    assert find(["zorg a", "zorg b", "c", "zorg d"]).nearly == ("zorg", ("c",))
    assert find(["zorg a", "b", "c", "zorg d"]).nearly is None


@pytest.mark.parametrize(
    ("captions", "prior", "other"),
    [
        (["1girl, (zorg:1.2), red hair", "(zorg:1.2)"], "1girl, red hair", r"1girl, \([a-z]+:1.2\), red hair"),
        (["佐格酱\uff0c微笑", "微笑\uff0c佐格酱"], "微笑", "[a-z]+\uff0c微笑"),
        ([f"1girl, {MIKU}, blue", f"{MIKU}, smile"], "1girl, blue", "1girl, [a-z]+, blue"),
        (["zorg, 1girl, blorpy, red", "blorpy, zorg"], "1girl, red", "[a-z]+, 1girl, red"),
        (["zorg, blorpy, red", "blorpy, zorg"], "red", "[a-z]+, red"),
        (["Zorg sits here. Zorg is red.", "Zorg"], None, "([a-z]+) sits here. \\1 is red."),
        (["zwx", "zwx"], "", "[a-z]+"),
    ],
)
def test_priors_name_another_thing_once(captions, prior, other):
    cut, *others = priors(captions[0], find(captions).trigger.pattern, "seed", 30)
    assert prior is None or cut == prior
    for text in others:
        assert re.fullmatch(other, text), text


def test_a_trigger_is_found_however_it_is_spelled():
    for spelled in ("hatsune miku (vocaloid)", MIKU, "Hatsune_Miku_(vocaloid)", "hatsune-miku \\(vocaloid\\)"):
        assert phrase_pattern("hatsune miku (vocaloid)").search(f"1girl, {spelled}, solo"), spelled
        assert phrase_pattern(MIKU).search(spelled), spelled
    assert phrase_pattern("zorg").search("zorg的照片")
    assert not phrase_pattern("zorg").search("zorgs")
    assert words_pattern("zorgchan, blorpy").sub("", "zorgchan blorpy").strip() == ""
