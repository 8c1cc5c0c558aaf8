"""Which captions name the same subject: those that are equal but for words that tell no subject."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from lora_diffusion.data.known_words import QUALITY, SAY_NOTHING, WORD

_STYLE = re.compile(r"[^\W_]+[\s_-]+style\b|\bstyle\s+of\s+[^\W_]+", re.IGNORECASE)
"""How something is drawn, and not what: "noto style", "style of zwx"."""


def partners(captions: Sequence[str], reference_captions: Sequence[str]) -> list[list[int]]:
    """Returns for each caption the indices of the references that show the subject it names.

    Two captions name the same subject if they have the same telling words, in any order. These are left out: linking
    words, "emoji", "picture" and the like, words of praise, "noto style" and other names of styles, and what all
    captions of one side share, as long as it tells nobody apart on the other side. So prompts of a single subject that
    has but one name pair with all references that show it.

    >>> partners(["an emoji of a nerd face", "a red apple"], ["face of a nerd, blob style", "a sleeping face"])
    [[0], []]

    Args:
        captions: without trigger words.
        reference_captions: the same; "" is a reference of which nothing is known, and pairs with none.
    """
    ours, theirs = [_words(text) for text in captions], [_words(text) for text in reference_captions]
    known = [words for words, text in zip(theirs, reference_captions, strict=True) if text]
    shared, shared_by_references = _shared(ours), _shared(known)
    idle = shared - _telling(known, shared_by_references)
    idle_in_references = shared_by_references - _telling(ours, shared)
    subjects = [
        words - idle_in_references if text else None for words, text in zip(theirs, reference_captions, strict=True)
    ]
    return [[index for index, subject in enumerate(subjects) if subject == words - idle] for words in ours]


def _words(caption: str) -> frozenset[str]:
    words = (word.casefold() for word in WORD.findall(_STYLE.sub(" ", caption)))
    return frozenset(words) - SAY_NOTHING - QUALITY


def _shared(captions: Collection[frozenset[str]]) -> frozenset[str]:
    """Returns the words that all of several different captions have."""
    distinct = set(captions)
    return frozenset.intersection(*distinct) if len(distinct) > 1 else frozenset()


def _telling(captions: Collection[frozenset[str]], shared: frozenset[str]) -> frozenset[str]:
    return frozenset().union(*captions) - shared
