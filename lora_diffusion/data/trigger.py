"""The trigger: what all captions share and nobody else uses."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lora_diffusion.data.captions import phrase_pattern
from lora_diffusion.data.known_words import (
    COMMON,
    COMPOUND,
    QUALITY,
    RARE,
    SAY_NOTHING,
    UNSPACED,
    WIDE_COMMAS,
    WIDE_STOPS,
    WORD,
    level,
    level_unspaced,
    trimmed_unspaced,
)

_IS_UNSPACED = re.compile(rf"[{UNSPACED}]")
_BREAK = re.compile(rf"[,;!?|{WIDE_COMMAS}{WIDE_STOPS}]|\.\s|\.$|:\s|<[^<>]*>|\bBREAK\b")
"""What ends a tag or a sentence, inside of which a trigger stands."""
_WEIGHT = re.compile(r":\s*-?[\d.]+(?=\s*\))")
_IDLE = SAY_NOTHING | QUALITY
_WEAK = frozenset(("style", "art", "manner", "look", "stil", "стиль", "стиле"))
"""Part of a trigger also with a word between, as in "style of zwx"."""
_END = "\n"
_MOSTLY, _FEWEST = 0.75, 3
"""Share of the captions, and how many, that tell of a trigger which the others lack."""


@dataclass(frozen=True)
class Trigger:
    """The words that call up what is trained."""

    units: tuple[str, ...] = ()
    """Words or phrases, each of which every caption should hold."""

    @property
    def text(self) -> str:
        """How it is published, "" without any."""
        return ", ".join(self.units)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What is cut out of captions, or replaced in them."""
        return re.compile("|".join(pattern.pattern for pattern in self._patterns), re.IGNORECASE)

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        # The longest comes first, so that none is cut short by a piece of it.
        return [phrase_pattern(unit) for unit in sorted(self.units, key=len, reverse=True)]

    def is_in(self, caption: str) -> bool:
        """Tells whether a caption holds all of it."""
        return all(pattern.search(caption) for pattern in self._patterns)


def in_folder_name(words: str, captions: Sequence[str]) -> Trigger | None:
    """Returns the words after the number of a folder such as "10_sks dog" where each caption holds them as a trigger.

    Args:
        words: the same of all images; "" where they are not.
        captions: of all images.
    """
    trigger = Trigger((" ".join(words.split()),))
    is_one = bool(words.strip()) and max(_levels(words)) == RARE and all(map(trigger.is_in, captions))
    return trigger if is_one else None


class SharedWords(NamedTuple):
    """What captions have in common."""

    trigger: Trigger
    common: tuple[str, ...] = ()
    """Tags, and where there is no trigger also phrases, that all share and that everybody knows."""
    is_compound: bool = False
    """The trigger is put together of words that everybody knows."""
    nearly: tuple[str, tuple[str, ...]] | None = None
    """Without a trigger: a rare word that most captions hold, and those captions which lack it."""


class _Phrase(NamedTuple):
    text: str
    level: int
    is_tag: bool


def find(captions: Sequence[str]) -> SharedWords:
    """Returns the trigger of captions: of what they share, the words that are rarest, as the first caption spells them.

    Words that stand together in every caption are one phrase, with what joins them: "blob style", "sks dog",
    "hatsune miku (vocaloid)". Empty captions are left out; fewer than two give no trigger.

    >>> find(["1girl, solo, zorgchan, red hair", "zorgchan, 1girl, solo"])[:2]
    (Trigger(units=('zorgchan',)), ('1girl', 'solo'))
    """
    filled = [caption for caption in captions if caption.strip()]
    if len(filled) <= 1:
        return SharedWords(Trigger())
    texts = list(dict.fromkeys(filled))
    phrases = _shared_phrases(texts)
    highest = max((phrase.level for phrase in phrases), default=COMMON)
    units = tuple(dict.fromkeys(phrase.text for phrase in phrases if phrase.level == highest > COMMON))
    trigger = Trigger(tuple(unit for unit in units if not any(unit != other and unit in other for other in units)))
    common = [phrase.text for phrase in phrases if phrase.level == COMMON and (phrase.is_tag or not units)]
    return SharedWords(trigger, tuple(common), highest == COMPOUND, None if units else _nearly(texts))


def _shared_phrases(texts: Sequence[str]) -> list[_Phrase]:
    """Returns the longest runs of words of the first text that all others hold as well, in order, without overlap."""
    plain = [_without_weights(text) for text in texts]
    joined = [_joined(text) for text in plain]
    # Short texts first: they are most likely to lack a phrase.
    others = sorted(joined[1:], key=len)
    shared = set.intersection(*(set(text.split()) for text in joined))
    return [
        phrase
        for segment in _segments(plain[0])
        for run in _runs(segment, shared, others)
        for phrase in _phrases(plain[0], segment, run, texts)
    ]


def _without_weights(text: str) -> str:
    """Blanks weights such as the ":1.2" of "(word:1.2)", whose digits are no words; all else keeps its place."""
    return _WEIGHT.sub(lambda match: " " * len(match[0]), text)


Words = Sequence[re.Match[str]]


def _segments(text: str) -> list[Words]:
    """Returns the words between two breaks."""
    ends = [*(match.span() for match in _BREAK.finditer(text)), (len(text), len(text))]
    starts = [0, *(end for _, end in ends)]
    pieces = [list(WORD.finditer(text, start, end)) for start, (end, _) in zip(starts, ends, strict=False)]
    return [piece for piece in pieces if piece]


def _joined(text: str) -> str:
    """Returns the words of a text with single spaces around them, and a sign of its own between segments."""
    return f" {_END} ".join(f" {' '.join(word[0].casefold() for word in words)} " for words in _segments(text))


def _runs(words: Words, shared: set[str], others: Sequence[str]) -> list[Words]:
    keys = [word[0].casefold() for word in words]
    runs, start = [], 0
    while start < len(words):
        stop = next((place for place in range(start, len(words)) if keys[place] not in shared), len(words))
        # What all texts hold, they hold the beginning of as well.
        end = start + bisect_left(
            range(start, stop), True, key=lambda last: not _in_all(keys[start : last + 1], others)
        )
        if end > start:
            runs.append(words[start:end])
        start = max(end, start + 1)
    return runs


def _in_all(keys: Sequence[str], texts: Sequence[str]) -> bool:
    phrase = f" {' '.join(keys)} "
    return all(phrase in text for text in texts)


def _phrases(text: str, segment: Words, run: Words, texts: Sequence[str]) -> list[_Phrase]:
    """Returns what a run of shared words says, in phrases where all captions write them alike, else in single words."""
    whole = _closed(text, run[0].start(), run[-1].end())
    is_tag = len(run) == len(segment)
    if is_tag and max(_levels(whole)) == COMMON:
        return [] if all(word[0].casefold() in SAY_NOTHING for word in run) else [_Phrase(whole, COMMON, True)]
    phrases = []
    for words in [run] if is_tag and re.search(r"[(\[]", whole) else _pieces(run):
        phrase = _closed(text, *_trimmed(text, words))
        rarity = max(_levels(phrase))
        if rarity == COMMON or all(map(phrase_pattern(phrase).search, texts)):
            phrases.append(_Phrase(phrase, rarity, is_tag))
        else:
            single = [word[0] for word in words if not _IS_UNSPACED.match(word[0])]
            phrases += [_Phrase(word, level(word), False) for word in single if word.casefold() not in _IDLE]
    return phrases


def _pieces(run: Words) -> list[Words]:
    """Returns the words between those that say nothing: "zorg style" of "a zorg style image of a dog".

    "style of zwx" is one piece.
    """
    pieces: list[list[re.Match[str]]] = [[]]
    for word in run:
        if word[0].casefold() not in SAY_NOTHING:
            pieces[-1].append(word)
        elif pieces[-1] and not all(word[0].casefold() in _WEAK for word in pieces[-1]):
            pieces.append([])
        elif pieces[-1]:
            pieces[-1].append(word)
    return list(filter(None, map(_without_idle_ends, pieces)))


def _without_idle_ends(words: Words) -> Words:
    places = [place for place, word in enumerate(words) if word[0].casefold() not in _IDLE]
    return words[places[0] : places[-1] + 1] if places else []


def _trimmed(text: str, words: Words) -> tuple[int, int]:
    """Returns where a phrase begins and ends, without what is common of a script without spaces at either end."""
    start, end = words[0].start(), words[-1].end()
    phrase = text[start:end]
    if _IS_UNSPACED.match(phrase) or _IS_UNSPACED.match(phrase[-1:]):
        kept = trimmed_unspaced(phrase)
        if max(_levels(kept)) == RARE:
            start += phrase.index(kept)
            end = start + len(kept)
    return start, end


def _closed(text: str, start: int, end: int) -> str:
    """Returns a piece of a text with the bracket that ends it, where one is open in it."""
    phrase = text[start:end]
    after = re.match(r"\s*\\?[)\]}]", text[end:])
    if after and sum(map(phrase.count, "([{")) > sum(map(phrase.count, ")]}")):
        phrase += after[0]
    return " ".join(phrase.split())


def _levels(phrase: str) -> list[int]:
    spaced = [level(word) for word in re.findall(rf"[^\W_{UNSPACED}]+", phrase)]
    return [*spaced, *map(level_unspaced, re.findall(rf"[{UNSPACED}]+", phrase)), COMMON]


def _nearly(texts: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """Returns a made-up word that most texts hold, and the others."""
    first_forms: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for text in texts:
        words = {word.casefold(): word for word in re.findall(rf"[^\W_{UNSPACED}]+", _without_weights(text))}
        counts.update(words.keys())
        first_forms = words | first_forms
    frequent = [key for key, count in counts.most_common(50) if count >= max(_MOSTLY * len(texts), _FEWEST)]
    rare = next((key for key in frequent if level(key) == RARE), None)
    if rare is None:
        return None
    pattern = phrase_pattern(rare)
    return first_forms[rare], tuple(text for text in texts if not pattern.search(text))
