"""What is asked about the pictures, and the answers; the colour is read from the pixels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.build_builtin.captions import article
from scripts.build_builtin.sources import TRAINING_STYLES, UNSEEN_STYLE
from scripts.build_builtin.subjects import Subject, read_subjects

QUESTIONS = {
    "what": ("What is this?", "What does the picture show?"),
    "style": ("Which style is it drawn in?", "What is the style?"),
    "colour": ("Which colour is it?", "What colour does it have?"),
    "caption": ("Describe the picture.", "Write a caption."),
}
"""Kind -> ways to ask."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
RARE_WORDS = ("sks", "ohwx", "zwx")
_WHITE, _BLACK, _PALE = 0.93, 0.25, 0.12
"""Least value of white, greatest of black, and the greatest saturation of grey."""
_FIRST_HUES = ((15, "red"), (43, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (290, "purple"))
"""Greatest hue in degrees of each colour of the circle; beyond are pink and red again."""
_LAST_PINK = 340


@dataclass(frozen=True)
class Turn:
    """One question about a picture."""

    kind: str
    question: str
    answer: str


def colour(pixels: Tensor) -> str:
    """The colour that most of a picture has besides its white background; `pixels` is [3, h, w] uint8."""
    flat = pixels.flatten(1).T.float() / 255
    drawn = flat[flat.min(dim=1).values < _WHITE]
    if len(drawn) < len(flat) / 20:
        return "white"
    names = [_name(*rgb) for rgb in drawn.tolist()]
    return max(COLOURS, key=names.count)


def _name(red: float, green: float, blue: float) -> str:
    high, low = max(red, green, blue), min(red, green, blue)
    if high < _BLACK:
        return "black"
    if (high - low) / high < _PALE:
        return "grey"
    hue = _hue(red, green, blue)
    name = next((name for most, name in _FIRST_HUES if hue < most), "pink" if hue < _LAST_PINK else "red")
    is_dark_orange = name in ("orange", "red") and 10 <= hue < 43 and high < 0.7
    return "brown" if is_dark_orange else name


def _hue(red: float, green: float, blue: float) -> float:
    high, low = max(red, green, blue), min(red, green, blue)
    if high == red:
        return 60 * ((green - blue) / (high - low)) % 360
    if high == green:
        return 60 * ((blue - red) / (high - low)) + 120
    return 60 * ((red - green) / (high - low)) + 240


def answers(subject: Subject, style: str, colour_name: str) -> dict[str, str]:
    """The right answer to each kind of question."""
    named = f"{article(subject.words)} {subject.words}"
    return {"what": named, "style": style, "colour": colour_name, "caption": f"an emoji of {named}, {style} style"}


def turns(right: dict[str, str], rng: random.Random, topics: Sequence[str] = tuple(QUESTIONS)) -> list[Turn]:
    """One question of each kind in random order and words."""
    chosen = rng.sample(list(topics), len(topics))
    return [Turn(topic, rng.choice(QUESTIONS[topic]), right[topic]) for topic in chosen]


def corpus() -> list[str]:
    """Lines that hold every word of questions and answers."""
    lines = [f" {question}" for ways in QUESTIONS.values() for question in ways]
    for subject in read_subjects():
        lines += [f" {answer}" for style in TRAINING_STYLES for answer in answers(subject, style, "red").values()]
    single = " ".join((*COLOURS, *TRAINING_STYLES, UNSEEN_STYLE, *RARE_WORDS))
    return [*lines, *["USER: ASSISTANT:", f" {single}"] * 500]


def colours(pixels: Tensor) -> list[str]:
    """`colour` of each of [n, 3, h, w] pictures, at half their size."""
    small = torch.nn.functional.avg_pool2d(pixels.float(), 2).round().to(torch.uint8)
    return [colour(picture) for picture in small]
