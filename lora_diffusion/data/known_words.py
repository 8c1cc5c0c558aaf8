"""Which words everybody knows, and the text encoder with them: those that are no good as a trigger."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from lora_diffusion.architectures import clip_tokenizer

COMMON, COMPOUND, RARE = range(3)
"""How well a word is known. COMPOUND ones are put together of two that are common, such as johnsmith."""

_LINKING_WORDS = (
    "a an the of in on at by to from with without and or as for into over under near is are was its his her their "
    "this that it"
)
_MEDIA_WORDS = "picture pictures photo photograph image emoji icon sticker drawing painting illustration portrait s t"


def _read_lists() -> dict[str, frozenset[str]]:
    """Returns the lists of common_words.txt by their names."""
    text = Path(__file__).with_name("common_words.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    _, *pieces = re.split(r"\[(.+)\]", "\n".join(lines))
    return {name: frozenset(words.split()) for name, words in zip(pieces[::2], pieces[1::2], strict=True)}


LINKING = frozenset(_LINKING_WORDS.split())
SAY_NOTHING = LINKING | frozenset(_MEDIA_WORDS.split())
_LISTS = _read_lists()
QUALITY = _LISTS["quality"]
"""What taggers put at the front of a caption to ask for good images, and captioners to begin a sentence."""

_LISTED = SAY_NOTHING | QUALITY | _LISTS["tags"] | _LISTS["other languages"]

_COMMON_UNSPACED = re.compile("|".join(sorted(map(re.escape, _LISTS["unspaced"]), key=len, reverse=True)))
"""The same of scripts that set no spaces between words."""

_USUAL_TRIGGER_WORDS = "sks ohwx tok shs sls lvl ttp uka hta zwx xyz bnha rnd skw ukj"
_USUAL_TRIGGERS = frozenset(_USUAL_TRIGGER_WORDS.split())
"""Rare tokens that guides recommend; some of them stand high in CLIP's table."""
_RANK_OF_RARE = 47_000
"""Whole words further down the merge table are as good as made up: sks has rank 47,624, blob 48,800."""
_RANK_IN_COMPOUNDS = 12_000
"""Further down there are many pieces of words, of which anything could be put together."""
_SUFFIXES = ("s", "es", "d", "ed", "ing", "ly", "er", "ers", "y", "ness", "less", "like")
_SHORTEST = 3
"""Letters of a stem, and of each half of a compound."""

WIDE_COMMAS, WIDE_STOPS = r"\uff0c\u3001\uff1b", r"\u3002\uff01\uff1f"
"""Commas and semicolons, full stops and the like, of Chinese and Japanese, for a regular expression."""
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana, Chinese and Korean characters, by the blocks of Unicode, for a regular expression:
no space stands between words, or before the endings of one."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
"""Of scripts that set no spaces between words, each character is one."""


def level(word: str) -> int:
    """Returns how well one word is known, without white space and signs in it: COMMON, COMPOUND or RARE.

    >>> [level(word) for word in ("1girl", "Zorgchan", "johnsmith", "m4r1a")]
    [0, 2, 1, 2]
    """
    key = word.casefold()
    if key in _USUAL_TRIGGERS:
        return RARE
    if len(key) == 1 or key.isdecimal() or key in _LISTED:
        return COMMON
    pieces = re.findall(r"\d+|\D+", key)
    letters = [piece for piece in pieces if not piece.isdecimal()]
    if len(letters) > 1:
        return RARE
    if len(pieces) > 1:
        return level(letters[0]) or (COMPOUND if key[0].isalpha() and len(letters[0]) >= _SHORTEST else COMMON)
    if key.isascii() and len(key) >= _SHORTEST and not set(key) & set("aeiouy"):
        return RARE
    return _level_of_letters(key)


def _level_of_letters(key: str) -> int:
    known = _known(_RANK_OF_RARE)
    if _bytes(key) in known:
        return COMMON
    stems = (key.removesuffix(suffix) for suffix in _SUFFIXES if key.endswith(suffix))
    if any(len(stem) >= _SHORTEST and _bytes(stem) in known for stem in stems):
        return COMMON
    halves = ((key[:at], key[at:]) for at in range(_SHORTEST, len(key) - _SHORTEST + 1))
    everyday = _known(_RANK_IN_COMPOUNDS)
    return COMPOUND if any(first in everyday and last in everyday for first, last in halves) else RARE


def level_unspaced(text: str) -> int:
    """Returns the same for characters of a script that sets no spaces; what is common in them is passed over.

    >>> level_unspaced("女孩的照片"), level_unspaced("佐格酱的照片")
    (0, 2)
    """
    return RARE if max(map(len, _COMMON_UNSPACED.sub(" ", text).split()), default=0) > 1 else COMMON


def trimmed_unspaced(text: str) -> str:
    """Returns such characters without the common ones at both ends.

    >>> trimmed_unspaced("佐格酱的照片")
    '佐格酱'
    """
    common = _COMMON_UNSPACED.pattern
    return re.sub(rf"^(?:{common})+|(?:{common})+$", "", text)


@cache
def _known(rank: int) -> frozenset[str]:
    """Returns the words that are one token of CLIP up to a rank of its merge table, written as there."""
    end = clip_tokenizer.END_OF_WORD
    lines = clip_tokenizer.merges()[:rank]
    return frozenset(line.replace(" ", "").removesuffix(end) for line in lines if line.endswith(end))


def _bytes(word: str) -> str:
    """Spells a word as CLIP's table does, in which each byte is one letter."""
    return word if word.isascii() else clip_tokenizer.as_bytes(word)
