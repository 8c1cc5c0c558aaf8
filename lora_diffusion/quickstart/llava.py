"""The whole way on the built-in LLaVA: train a new drawing style, answer before and after, report."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.quickstart import _text_output
from lora_diffusion.report.quickstart_page import TextPage
from lora_diffusion.workflows.ask import score_answers


def _page(scores: _text_output.Scores) -> TextPage:
    rows: list[tuple[Any, ...]] = []
    for name, (before, after) in scores.items():
        means = [result.scores[metric] for metric in ("exact_match", "token_f1") for result in (before, after)]
        rows.append((name, "all", len(before.texts), *means))
        shares = [result.rates()["by_question"] for result in (before, after)]
        for question in shares[0]:
            count = sum(result.question == question for result in before.texts)
            rows.append((name, question, count, *(share[question] for share in shares), "", ""))
    examples, images = [], []
    for before, after in scores.values():
        adapted, worst = {result.key: result.text for result in after.texts}, before.texts[: _text_output.NUM_EXAMPLES]
        examples += [(result.question, result.target, result.text, adapted[result.key]) for result in worst]
        images += [Path(result.image) for result in worst]
    return TextPage(
        title="lora-diffusion quickstart: emoji questions",
        subtitle="The same questions about images that were not trained on, before and after training.",
        score_names=("images", "question", "number#", "exact before#", "exact after#", "F1 before#", "F1 after#"),
        scores=rows,
        about="Share of answers that are right to the letter, and F1 of the words that answer and target share, "
        "articles left out. Higher is better. The base never saw the new style; the adapter saw other images of it.",
        example_names=("question", "right", "answer of the base", "answer with the adapter"),
        examples=examples,
        about_examples="Of each set those that the base answered worst.",
        images=images,
    )


def _next_commands(model: str, adapter: str) -> tuple[str, ...]:
    file = shlex.quote(adapter)
    return (
        f"lora-diffusion ask --model {model} --adapter {file} --question 'What is this?' YOUR_PICTURE.png",
        f"lora-diffusion data caption YOUR_PICTURES --model {model} --adapter {file}",
        "lora-diffusion train --config llava/emoji data.path=YOUR_CHATS.json output.path=my-answers",
    )


TASK = _text_output.TextQuickstart(
    config="llava/emoji",
    data="emoji-questions",
    tests={"new style": "new", "known styles": "known"},
    score=score_answers,
    metric="exact_match",
    heading="Answers about images that were not trained on, right to the letter:",
    page=_page,
    commands=_next_commands,
)
quickstart = partial(_text_output.quickstart, TASK)
