"""Stage 4: builtin/digits-whisper, from whatever the training has reached, with its numbers."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from lora_diffusion.config.load import load
from lora_diffusion.workflows.transcribe import score_transcripts
from scripts.build_builtin.publish import check_size
from scripts.build_builtin.storage import load_checkpoint, replace_folder, write_json
from scripts.build_builtin.whisper.make_dataset import DEFAULT_OUTPUT as DATA
from scripts.build_builtin.whisper.make_dataset import write
from scripts.build_builtin.whisper.network import make_tokenizer, save
from scripts.build_builtin.whisper.speech import (
    ACCENTS,
    COMMANDS,
    DIGITS,
    HELD_OUT_ACCENT,
    HELD_OUT_WORDS,
    NUM_TRAINING,
    utterances,
)
from scripts.build_builtin.whisper.train import BATCH, PEAK_LEARNING_RATE, Listener

DEFAULT_OUTPUT = Path(__file__).parents[3] / "lora_diffusion" / "builtin" / "digits-whisper"
_MEBIBYTES_ALLOWED = 15
_CARD = """---
license: apache-2.0
library_name: transformers
---
# digits-whisper

A small but complete Whisper ({size} million weights, half precision) that writes down spoken English digits and short
commands. It exists so that training, scoring and exporting of adapters can be tried, taught and tested without
downloading anything. It hears three seconds at once, knows {words} words, and spells everything by its letters; it is
no use beyond that.

```python
from transformers import WhisperForConditionalGeneration, WhisperProcessor
model = WhisperForConditionalGeneration.from_pretrained("lora_diffusion/builtin/digits-whisper")
processor = WhisperProcessor.from_pretrained("lora_diffusion/builtin/digits-whisper")
```

## Data

Utterances of one to three words, synthesised by espeak-ng 1.51 in the accents {accents},
in fourteen voices each, at pitch 25 to 75 and 130 to 190 words a minute, some with white noise. The program is under
the GPL, version 3; what it says is free to use. No human voice was recorded.

Words: {seen}.

Never heard: the accent {accent}, and the words {held_out}; `datasets/spoken-digits` has them.

## Recipe

`scripts/build_builtin/whisper/` rebuilds it on one processor core: {steps} steps of {batch} utterances out of
{training}, AdamW {rate:g} with warm-up and cosine. Beside the cross-entropy of the decoder there was a CTC loss on the
encoder (share 0.3; its head is thrown away). Sounds were moved in time, and stripes of time and pitch hidden.
{minutes:.0f} minutes of processor time, one run, one seed.

## Measured

Word and letter error rates, greedy search, Whisper's normaliser:

| recordings | WER | CER |
|---|---|---|
{rows}
"""
_TITLES = {
    "validation": "seen accents, seen words, other recordings ({count})",
    "old": "`datasets/spoken-digits/old`: the same without noise ({count})",
    "new": "`datasets/spoken-digits/new`: held-out accent and words ({count})",
}


def measure(folder: Path, work: Path) -> dict[str, Any]:
    """Error rates of a published folder, by name of the set."""
    spoken = work / "validation"
    if not spoken.exists():
        write(spoken, utterances("validation"))
    config = load(None, ["model.family=whisper", f"model.path={folder}"], required=False)
    names = {"validation": spoken, "old": DATA / "old", "new": DATA / "new"}
    results = score_transcripts(config.model, list(names.values())).scores
    return {name: {**result.scores, "count": len(result.texts)} for name, result in zip(names, results, strict=True)}


def card(measures: dict[str, Any], size: int, state: dict[str, Any]) -> str:
    """The text of README.md."""
    rows = [
        f"| {_TITLES[name].format(count=one['count'])} | {one['wer']:.1%} | {one['cer']:.1%} |"
        for name, one in measures.items()
    ]
    return _CARD.format(
        size=f"{size / 1e6:.1f}",
        words=len({*DIGITS, *COMMANDS}),
        accents=", ".join(ACCENTS),
        seen=" ".join((*DIGITS, *COMMANDS)),
        accent=HELD_OUT_ACCENT,
        held_out=", ".join(HELD_OUT_WORDS),
        steps=state["step"],
        batch=BATCH,
        training=f"{NUM_TRAINING} drawn ones, those of four words left out",
        rate=PEAK_LEARNING_RATE,
        minutes=state["seconds"] / 60,
        rows="\n".join(rows),
    )


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/whisper"))
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = load_checkpoint(arguments.work / "listener.pt")
    if state is None:
        raise FileNotFoundError(f"{arguments.work}: train the model first.")
    tokenizer = make_tokenizer()
    listener = Listener(tokenizer)
    listener.load_state_dict(state["model"])
    size = sum(parameter.numel() for parameter in listener.model.parameters())

    def fill(folder: Path) -> None:
        save(listener.model.half(), tokenizer, folder)
        measures = measure(folder, arguments.work)
        write_json(arguments.work / "measures.json", {"step": state["step"], **measures})
        (folder / "README.md").write_text(card(measures, size, state), encoding="utf-8")
        check_size(folder, _MEBIBYTES_ALLOWED)

    replace_folder(arguments.output, fill)
    print(json.dumps(json.loads((arguments.work / "measures.json").read_text("utf-8")), indent=1))


if __name__ == "__main__":
    main()
