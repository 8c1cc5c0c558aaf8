"""What is wrong with captions beyond their being there: what the text encoder does not read, or reads amiss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lora_diffusion.core.base_model import BaseInfo
from lora_diffusion.core.logs import logger
from lora_diffusion.core.text import name_some, shown
from lora_diffusion.data.captions import Lines
from lora_diffusion.data.folder import Folder
from lora_diffusion.data.known_words import UNSPACED
from lora_diffusion.data.trigger import SharedWords, Trigger

_SYNTAX = {
    "wildcards such as {a|b} or __name__": re.compile(r"\{[^{}]*\|[^{}]*\}|(?<!\w)__[\w/*-]+?__(?!\w)"),
    "weights such as (word:1.2) or ((word))": re.compile(
        r"(?<!\\)[(\[][^()\[\]]*:\s*-?\d*\.?\d+\s*[)\]]|\({2,}|\[{2,}"
    ),
    "adapters or embeddings such as <lora:name:1>": re.compile(
        r"<(?:lora|lyco|lycoris|hypernet|loha|lokr|locon|ti|embedding)\s*:[^<>]*>|\bembedding:\S+", re.IGNORECASE
    ),
    "BREAK": re.compile(r"\bBREAK\b"),
    "brackets with a backslash": re.compile(r"\\[()\[\]{}]"),
    "options such as --n or --w 512": re.compile(r"(?:^|\s)--(?:n|w|h|s|l|d|ar|v|no|niji|style|seed|cfg|steps)\b"),
}
"""What programs that make images understand in prompts -> how it is written. Training reads each as it stands."""

_SIDE_WORDS = """
    left right leftmost rightmost leftward rightward leftwards rightwards lefthand righthand clockwise anticlockwise
    counterclockwise links rechts linke rechte linken rechten gauche droite izquierda derecha izquierdo derecho sinistra
    destra esquerda direita лево право слева справа влево вправо левый правый левая правая
"""
_WRITING_WORDS = """
    text texts letters lettering writing handwriting written words caption subtitle subtitles logo logos slogan
    watermark signature calligraphy speedometer clock map flag number numbers label labels billboard
"""
_UNSPACED_SIDES, _UNSPACED_WRITING = r"[左右]", r"文字|文本|字母|ロゴ|글자"


def check(
    folder: Folder,
    texts: Mapping[Path, Lines],
    trigger: Trigger,
    info: BaseInfo,
    is_flipped: bool,
    errors: list[str],
) -> None:
    """Warns of captions that are not read as they were meant.

    Args:
        folder: names the images.
        texts: the captions of each image.
        trigger: what should call up what is trained.
        info: how much of a caption the base reads.
        is_flipped: `data.flip`.
        errors: one line is added for each image whose trigger is cut off.
    """
    named = [(folder.name(path), text) for path, lines in texts.items() for text in lines]
    _check_length(named, trigger, info, errors)
    _warn_of_syntax(named)
    if is_flipped:
        _warn_of_flip(named)


def _check_length(named: Sequence[tuple[str, str]], trigger: Trigger, info: BaseInfo, errors: list[str]) -> None:
    if info.text_limit is None:
        return
    limit = info.text_limit.max_tokens
    cuts = info.text_limit.cuts([text for _, text in named])
    long = [(name, text, cut) for (name, text), cut in zip(named, cuts, strict=True) if cut]
    if not long:
        return
    logger.warning(
        "Captions longer than the %d tokens that the text encoder reads: %d (%s). The rest of each is cut off.",
        limit,
        len(long),
        name_some([f"{name} has {cut.num_tokens}" for name, _, cut in long]),
    )
    errors.extend(
        f'{name}: the trigger "{trigger.text}" stands behind the {limit} tokens of its caption that the text encoder '
        f"reads (it has {cut.num_tokens}); move it to the front."
        for name, text, cut in long
        if trigger.is_in(text) and not trigger.is_in(text[: cut.num_read])
    )


def _warn_of_syntax(named: Sequence[tuple[str, str]]) -> None:
    for what, pattern in _SYNTAX.items():
        names = _names(named, pattern)
        if names:
            logger.warning(
                "Captions with %s, which training takes literally: %d (%s). Write plain words instead.",
                what,
                len(names),
                name_some(names),
            )


def _warn_of_flip(named: Sequence[tuple[str, str]]) -> None:
    for what, pattern in (
        ("say left or right", _words(_SIDE_WORDS, _UNSPACED_SIDES)),
        ("speak of writing or other things that have no mirror image", _words(_WRITING_WORDS, _UNSPACED_WRITING)),
    ):
        names = _names([(name, text.replace("_", " ")) for name, text in named], pattern)
        if names:
            logger.warning(
                "data.flip=true mirrors images, but captions %s: %d (%s). Set data.flip=false.",
                what,
                len(names),
                name_some(names),
            )


def _words(words: str, unspaced: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(words.split())})(?:\b|(?=(?-i:[{UNSPACED}])))|{unspaced}", re.IGNORECASE)


def _names(named: Iterable[tuple[str, str]], pattern: re.Pattern[str]) -> list[str]:
    return list(dict.fromkeys(name for name, text in named if pattern.search(text)))


def warn_of_trigger(folder: Folder, texts: Mapping[Path, Lines], shared: SharedWords) -> None:
    """Warns where the trigger that was found may not be the one that is meant."""
    units, common = shared.trigger.units, [f'"{shown(text)}"' for text in dict.fromkeys(shared.common)]
    if shared.is_compound:
        logger.warning(
            'All captions share "%s", which is taken for the trigger though it is made of common words. If another one '
            'is meant, name it with data.trigger; if none is, set data.trigger="".',
            shared.trigger.text,
        )
    elif len(units) > 1:
        logger.warning(
            "All captions share several rare words, which are taken for the trigger together: %s. If only one of them "
            "calls up what is trained, name it with data.trigger.",
            name_some([f'"{unit}"' for unit in units], 10),
        )
    if common and units:
        logger.warning(
            "All captions also share %s: common words, and so no part of the trigger.",
            name_some(common, 5),
        )
    elif common:
        logger.warning(
            "All captions share %s, but these are common words, and taking them for the trigger would change what they "
            "mean. Give all captions a made-up word too, or name the trigger with data.trigger.",
            name_some(common, 5),
        )
    if shared.nearly:
        word, lacking = shared.nearly
        names = [folder.name(path) for path, lines in texts.items() if set(lines) & set(lacking)]
        logger.warning(
            'Most captions hold "%s", but not those of %d image(s) (%s), so it is no trigger; add it to them.',
            shown(word),
            len(names),
            name_some(names),
        )
