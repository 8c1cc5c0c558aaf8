"""Stage 2: projector and language model, on what the image tower of stage 1 sees. It goes on from its checkpoint."""

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from scripts.build_builtin.llava.network import IMAGE, PATCH, PIXELS, make_model, make_tokenizer
from scripts.build_builtin.llava.questions import Turn, answers, colours, turns
from scripts.build_builtin.llava.train_tower import augmented, features
from scripts.build_builtin.pictures import Pictures, read_pictures, training_pictures
from scripts.build_builtin.storage import load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import SCORER

BATCH = 48
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 60
CHECKPOINT_SECONDS = 60
NUM_COPIES = 6
"""Of each picture, moved in different ways."""
IGNORED = -100
NUM_PATCHES = (PIXELS // PATCH) ** 2


def trained_vision(work: Path) -> CLIPVisionModel:
    """The image tower of stage 1."""
    from scripts.build_builtin.llava.network import vision_config

    state: Any = load_checkpoint(work / "tower.pt")
    vision = CLIPVisionModel(vision_config())
    weights = {
        name.removeprefix("vision."): value for name, value in state["model"].items() if name.startswith("vision.")
    }
    vision.load_state_dict(weights)
    return vision.eval()


def seen(vision: CLIPVisionModel, pictures: Pictures) -> Tensor:
    """Features of the copies of each picture, [copies, n, patches, width], half precision."""
    copies = []
    with torch.no_grad():
        for copy in range(NUM_COPIES):
            rng = torch.Generator().manual_seed(90_000 + copy)
            parts = torch.arange(len(pictures)).split(128)
            copies.append(torch.cat([features(vision, augmented(pictures, part, rng)).half() for part in parts]))
    return torch.stack(copies)


def tokens_and_labels(tokenizer: PreTrainedTokenizerFast, conversation: list[Turn]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation about a picture, and labels, which leave out all but the answers."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for index, turn in enumerate(conversation):
        picture = f"{IMAGE * NUM_PATCHES}\n" if index == 0 else ""
        question = tokenizer(f"USER: {picture}{turn.question} ASSISTANT:", add_special_tokens=False).input_ids
        answer = tokenizer(f" {turn.answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids
        ids += question + answer
        labels += [IGNORED] * len(question) + answer
    return ids, labels


def padded(rows: list[list[int]], value: int) -> Tensor:
    """[n, longest], filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class Conversations:
    """Conversations about the training pictures."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pictures: Pictures, copies: Tensor) -> None:
        self.tokenizer, self.copies = tokenizer, copies
        named = zip(pictures.subjects, pictures.styles, colours(pictures.pixels), strict=True)
        self.right = [answers(subject, style, colour) for subject, style, colour in named]

    def draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, labels, features of a batch that depends on the step only."""
        rng = random.Random(step)
        rows = [rng.randrange(len(self.right)) for _ in range(BATCH)]
        spelled = [tokens_and_labels(self.tokenizer, turns(self.right[row], rng)) for row in rows]
        seen = torch.stack([self.copies[rng.randrange(NUM_COPIES), row] for row in rows]).float()
        ids = padded([ids for ids, _ in spelled], self.tokenizer.pad_token_id)
        return ids, padded([labels for _, labels in spelled], IGNORED), seen


def loss(model: LlavaForConditionalGeneration, ids: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Mean over all tokens of answers; padding is on the right, where causal attention needs no mask."""
    embedded = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(seen)
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], projected)
    hidden = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
    wanted = labels[:, 1:]
    is_answer = wanted != IGNORED
    return F.cross_entropy(model.lm_head(hidden[is_answer]), wanted[is_answer])


def train(work: Path, num_steps: int) -> None:
    """Train up to a step, over any number of starts."""
    pictures = training_pictures(read_pictures(work.parent), SCORER)
    tokenizer = make_tokenizer()
    vision = trained_vision(work)
    data = Conversations(tokenizer, pictures, seen(vision, pictures))
    model = make_model(tokenizer)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    trained = [*model.model.multi_modal_projector.parameters(), *model.model.language_model.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    path = work / "llava.pt"
    state = load_checkpoint(path) or {"step": 0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    saved = time.monotonic()
    for step in range(state["step"], num_steps):
        value = loss(model, *data.draw(step))
        warm = min(1.0, (step + 1) / WARMUP_STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * warm * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        is_last = step + 1 == num_steps
        if (step + 1) % 20 == 0 or is_last:
            print(f"llava step {step + 1} cpu {time.process_time():.0f} loss {value.item():.3f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or is_last:
            save_checkpoint(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            saved = time.monotonic()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin/llava"))
    parser.add_argument("--steps", type=int, default=320)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.work, arguments.steps)


if __name__ == "__main__":
    main()
