"""Stage 4: builtin/emoji-llava, from whatever the training has reached, with its numbers."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from lora_diffusion.config.load import load
from lora_diffusion.workflows.ask import score_answers
from scripts.build_builtin.cards import sources_table
from scripts.build_builtin.llava.make_dataset import DEFAULT_OUTPUT as DATA
from scripts.build_builtin.llava.make_dataset import items, write
from scripts.build_builtin.llava.network import make_model, make_tokenizer, save
from scripts.build_builtin.llava.questions import QUESTIONS, RARE_WORDS
from scripts.build_builtin.llava.train import BATCH
from scripts.build_builtin.llava.train_tower import BATCH as TOWER_BATCH
from scripts.build_builtin.pictures import read_pictures
from scripts.build_builtin.publish import check_size
from scripts.build_builtin.sources import TRAINING_STYLES, UNSEEN_STYLE
from scripts.build_builtin.storage import load_checkpoint, replace_folder, write_json
from scripts.build_builtin.subjects import SCORER, read_subjects, visible

DEFAULT_OUTPUT = Path(__file__).parents[3] / "lora_diffusion" / "builtin" / "emoji-llava"
NUM_MEASURED = 80
_MEBIBYTES_ALLOWED = 15
_CARD = """---
license: apache-2.0
library_name: transformers
---
# emoji-llava

A small but complete LLaVA ({size} million weights, half precision): a CLIPVisionModel, a projector and a Llama that
answers questions about drawings of {names} things in six styles. It exists so that training, scoring and exporting of
adapters can be tried, taught and tested without downloading anything; it is no use beyond that.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained("lora_diffusion/builtin/emoji-llava")
processor = AutoProcessor.from_pretrained("lora_diffusion/builtin/emoji-llava")
```

It knows these questions: {questions}

## Parts

- Image tower: {tower} million weights, 48x48 pixels, 36 patches. The image tower of `emoji-clip` is a ResNet, which
  LLaVA's code cannot hold; this one was trained to give its embeddings, and to tell names and styles, on the same
  pictures.
- Projector and language model: {language} million weights, trained on what the finished tower sees; tokenizer of
  {vocabulary} byte-level tokens, in which most words are one. The words `{unseen}`, `sks`, `ohwx` and `zwx` are one
  token each and were never said; they have random embeddings of the usual length.

## Data

{sources}

Answers come from the names of the pictures; colours were counted from their pixels (`questions.py`).

Never seen: the style of Noto Emoji before 2017 (`{unseen}`; `datasets/emoji-questions` has it), and the subjects
{subjects}.

## Recipe

`scripts/build_builtin/llava/` rebuilds it on one processor core: {tower_steps} steps of {tower_batch} pictures for the
tower, {steps} steps of {batch} conversations of four questions for the rest; AdamW with warm-up and cosine; pictures
moved, and some with a rectangle cut out. One run, one seed.

## Measured

Share of answers that are right to the letter, greedy search:

| pictures | what | style | colour | caption | all |
|---|---|---|---|---|---|
{rows}
"""
_TITLES = {
    "training": "of the training data, as they are ({count})",
    "style": f"of the style `{UNSEEN_STYLE}`, known subjects ({{count}})",
}


def refresh_rare_words(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives words that were never said embeddings of the usual length in random directions.

    Training made them short and turned them away from all that is ever said, so that no adapter could make the model
    say them, as the embeddings of real models, which have read everything, do not forbid.
    """
    weight = model.get_input_embeddings().weight.data
    rows = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in (UNSEEN_STYLE, *RARE_WORDS)]
    if any(len(row) != 1 for row in rows):
        raise ValueError("A rare word is not one token.")
    drawn = torch.randn(len(rows), weight.shape[1], generator=torch.Generator().manual_seed(3))
    weight[[row[0] for row in rows]] = drawn / drawn.norm(dim=1, keepdim=True) * weight.norm(dim=1).median()


def measure(folder: Path, work: Path) -> dict[str, Any]:
    """Exact match by kind of question, and of all, on training pictures and on those of the held-out style."""
    pictures = read_pictures(work.parent)
    known = {subject.name for subject in visible(read_subjects(), SCORER)}
    rows = [row for row in range(len(pictures)) if pictures.subjects[row].name in known]
    chosen = {
        "training": [row for row in rows if pictures.styles[row] in TRAINING_STYLES],
        "style": [row for row in rows if pictures.styles[row] == UNSEEN_STYLE],
    }
    files = []
    for name, rows in chosen.items():
        drawn = sorted(random.Random(5).sample(rows, min(NUM_MEASURED, len(rows))))
        files.append(work / "measured" / name)
        if not files[-1].exists():
            write(files[-1], pictures, items(pictures, drawn), apart=True)
    config = load(None, ["model.family=llava", f"model.path={folder}"], required=False)
    results = score_answers(config.model, files).scores
    return {
        name: {topic: result.by_question[ways[0]] for topic, ways in QUESTIONS.items()}
        | {"all": result.scores["exact_match"], "count": len(result.texts) // len(QUESTIONS)}
        for name, result in zip(chosen, results, strict=True)
    }


def card(model: LlavaForConditionalGeneration, measures: dict[str, Any], steps: int, tower_steps: int) -> str:
    """The text of README.md."""
    subjects = read_subjects()
    rows = [
        f"| {_TITLES[name].format(count=one['count'])} | "
        + " | ".join(f"{one[topic]:.1%}" for topic in (*QUESTIONS, "all"))
        + " |"
        for name, one in measures.items()
    ]
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    size = sum(parameter.numel() for parameter in model.parameters())
    return _CARD.format(
        size=f"{size / 1e6:.1f}",
        tower=f"{tower / 1e6:.1f}",
        language=f"{(size - tower) / 1e6:.1f}",
        names=len(visible(subjects, SCORER)),
        questions=" ".join(f'"{question}"' for ways in QUESTIONS.values() for question in ways),
        vocabulary=f"{model.config.text_config.vocab_size:,}",
        unseen=UNSEEN_STYLE,
        subjects=", ".join(subject.words for subject in subjects if subject.split == "unseen"),
        sources=sources_table(),
        tower_steps=tower_steps,
        tower_batch=TOWER_BATCH,
        steps=steps,
        batch=BATCH,
        rows="\n".join(rows),
    )


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/llava"))
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state, tower = (load_checkpoint(arguments.work / name) for name in ("llava.pt", "tower.pt"))
    if state is None or tower is None:
        raise FileNotFoundError(f"{arguments.work}: train the model first.")
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.load_state_dict(state["model"])
    refresh_rare_words(model, tokenizer)

    def fill(folder: Path) -> None:
        save(model.half(), tokenizer, folder)
        measures = measure(folder, arguments.work)
        write_json(arguments.work / "measures.json", {"step": state["step"], "data": str(DATA.name), **measures})
        (folder / "README.md").write_text(card(model, measures, state["step"], tower["step"]), encoding="utf-8")
        check_size(folder, _MEBIBYTES_ALLOWED)

    replace_folder(arguments.output, fill)
    print(json.dumps(json.loads((arguments.work / "measures.json").read_text("utf-8")), indent=1))


if __name__ == "__main__":
    main()
