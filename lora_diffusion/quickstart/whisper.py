"""The whole way on the built-in Whisper: train new words in a new accent, transcribe before and after, report."""

from __future__ import annotations

import shlex
from functools import partial

from lora_diffusion.quickstart import _text_output
from lora_diffusion.report.quickstart_page import TextPage
from lora_diffusion.workflows.transcribe import score_transcripts


def _page(scores: _text_output.Scores) -> TextPage:
    rows = [
        (name, len(before.texts), *(result.scores[metric] for metric in ("wer", "cer") for result in (before, after)))
        for name, (before, after) in scores.items()
    ]
    examples = []
    for before, after in scores.values():
        adapted, worst = {result.key: result.text for result in after.texts}, before.texts[: _text_output.NUM_EXAMPLES]
        examples += [(result.target, result.text, adapted[result.key]) for result in worst]
    return TextPage(
        title="lora-diffusion quickstart: spoken digits",
        subtitle="The same recordings, transcribed before and after training; none of them was trained on.",
        score_names=("recordings", "number#", "WER before#", "WER after#", "CER before#", "CER after#"),
        scores=rows,
        about="Edits that turn what was heard into what was said, divided by the length of what was said: of words "
        "(WER) and of letters (CER). Lower is better. Both texts went through Whisper's normaliser.",
        example_names=("said", "heard by the base", "heard with the adapter"),
        examples=examples,
        about_examples="Of each set those that the base understood worst.",
    )


def _next_commands(model: str, adapter: str) -> tuple[str, ...]:
    return (
        f"lora-diffusion transcribe --model {model} --adapter {shlex.quote(adapter)} YOUR_RECORDING.wav",
        f"lora-diffusion inspect {shlex.quote(adapter.removesuffix(':1'))}",
        "lora-diffusion train --config whisper/digits data.path=YOUR_RECORDINGS output.path=my-words",
    )


TASK = _text_output.TextQuickstart(
    config="whisper/digits",
    data="spoken-digits",
    tests={"new accent and words": "new", "old accents and words": "old"},
    score=score_transcripts,
    metric="wer",
    heading="Words that were misheard in recordings that were not trained on (WER):",
    page=_page,
    commands=_next_commands,
)
quickstart = partial(_text_output.quickstart, TASK)
