"""Caption templates of the training pictures and the words the tokenizer must know."""

import random

from scripts.build_builtin.subjects import Subject

STYLED = (
    "an emoji of {a} {name}, {style} style",
    "{a} {name}, {style} style",
    "{name}, {style} style",
    "{style} style {name}",
    "a picture of {a} {name} in {style} style",
    "{a} {name} emoji, {style} style",
    "a {style} style picture of {a} {name}",
    "an icon of {a} {name}, {style} style",
    "{name} {group}, {style} style",
)
PLAIN = (
    "an emoji of {a} {name}",
    "{a} {name}",
    "a picture of {a} {name}",
    "{name}",
    "{name} {group}",
)
# No name: the class prompt that prior preservation and rare-token concepts lean on.
GENERIC = ("an emoji of {a_group} {group}, {style} style", "{a_group} {group}, {style} style")
STYLED_SHARE = 0.75
GENERIC_SHARE = 0.04

RARE_TOKENS = ("sks", "ohwx", "zwx", "blob")
COMMON_WORDS = (
    "red orange yellow green blue purple pink brown black white grey gray gold silver dark light bright "
    "round square small big large tiny long short tall thin fat happy sad angry funny cute old new "
    "style picture photo drawing painting icon emoji sticker cartoon of a an the in on with and wearing "
    "holding two three many background flat shiny glossy outlined simple colorful pixel art watercolor "
    "animal face food plant heart object sky character fruit person thing shape line circle star"
)


def article(words: str) -> str:
    """Indefinite article that fits the first letter."""
    return "an" if words[0] in "aeiou" and not words.startswith("uni") else "a"


def render(template: str, subject: Subject, style: str) -> str:
    """Template filled in for one subject in one style."""
    return template.format(
        a=article(subject.words),
        name=subject.words,
        style=style,
        group=subject.group,
        a_group=article(subject.group),
    )


def draw(subject: Subject, style: str, rng: random.Random) -> str:
    """A caption from a random template; about three quarters name the style."""
    share = rng.random()
    if share < GENERIC_SHARE:
        return render(rng.choice(GENERIC), subject, style)
    templates = STYLED if rng.random() < STYLED_SHARE else PLAIN
    return render(rng.choice(templates), subject, style)


def every(subject: Subject, style: str) -> list[str]:
    """All captions that `draw` can return for the picture."""
    return [render(template, subject, style) for template in (*STYLED, *PLAIN, *GENERIC)]
