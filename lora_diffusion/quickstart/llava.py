"""The whole way on the built-in LLaVA: train a new drawing style, answer before and after, report."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

from lora_diffusion.quickstart import _writing
from lora_diffusion.report.text_page import TextPage
from lora_diffusion.workflows.ask import score_answers


def _page(scores: _writing.Scores) -> TextPage:
    rows: list[tuple[Any, ...]] = []
    for name, (before, after) in scores.items():
        total = (name, "all", len(before.answers), before.exact_match, after.exact_match)
        rows.append((*total, before.token_f1, after.token_f1))
        for question, share in before.by_question.items():
            count = sum(one.question == question for one in before.answers)
            rows.append((name, question, count, share, after.by_question[question], "", ""))
    examples, pictures = [], []
    for before, after in scores.values():
        said, worst = {one.key: one.answer for one in after.answers}, before.answers[: _writing.NUM_EXAMPLES]
        examples += [(one.question, one.target, one.answer, said[one.key]) for one in worst]
        pictures += [Path(one.picture) for one in worst]
    return TextPage(
        title="lora-diffusion quickstart: emoji questions",
        subtitle="The same questions about pictures that were not trained on, before and after training.",
        score_names=("pictures", "question", "number#", "exact before#", "exact after#", "F1 before#", "F1 after#"),
        scores=rows,
        about="Share of answers that are right to the letter, and F1 of the words that answer and target share, "
        "articles left out. Higher is better. The base never saw the new style; the adapter saw other pictures of it.",
        example_names=("question", "right", "answer of the base", "answer with the adapter"),
        examples=examples,
        about_examples="Of each set those that the base answered worst.",
        pictures=pictures,
    )


def _next_commands(model: str, adapter: str) -> tuple[str, ...]:
    file = shlex.quote(adapter)
    return (
        f"lora-diffusion ask --model {model} --adapter {file} --question 'What is this?' YOUR_PICTURE.png",
        f"lora-diffusion data caption YOUR_PICTURES --model {model} --adapter {file}",
        "lora-diffusion train --config llava/emoji data.path=YOUR_CHATS.json output.path=my-answers",
    )


SHOW = _writing.Show(
    config="llava/emoji",
    data="emoji-questions",
    tests={"new style": "new", "known styles": "known"},
    examine=score_answers,
    score="exact_match",
    heading="Answers about pictures that were not trained on, right to the letter:",
    page=_page,
    commands=_next_commands,
)
quickstart = partial(_writing.quickstart, SHOW)
