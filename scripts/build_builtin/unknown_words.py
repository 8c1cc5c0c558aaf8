"""Stage 6b: text encoder and denoiser learn to look past words that mean nothing, as large bases do.

A copy of both sees captions with made-up words in them and must predict what the originals predict for the plain
captions, at the same noisy latents. The two differ in the words only, so no noise of a denoising target buries the
difference: some forty thousand samples are enough.

What the original text encoder says of the words must stay readable from the copy's, by a linear map. Without that all
made-up words come to mean the same, and an adapter learns one of them three times as slowly.
"""

import argparse
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from scripts.build_builtin.captions import COMMON_WORDS, RARE_TOKENS, draw
from scripts.build_builtin.latents import trained_text_encoder
from scripts.build_builtin.networks import make_unet, read_tokenizer
from scripts.build_builtin.pictures import read_pictures, training_pictures
from scripts.build_builtin.storage import MovingAverage, load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import GENERATOR, read_subjects
from scripts.build_builtin.tokenizer import CONTEXT_LENGTH
from scripts.build_builtin.train_unet import (
    CAPTION_DROPOUT,
    CHECKPOINT_SECONDS,
    LOG_STEPS,
    LatentBatches,
    Stopwatch,
    fastest_arithmetic,
)

CHECKPOINT = "unknown-words.pt"
TEXT_LEARNING_RATE, UNET_LEARNING_RATE, READER_LEARNING_RATE = 3e-4, 2e-4, 1e-3
READABLE_WEIGHT = 0.03
WARM_UP_STEPS = 100
AVERAGE_DECAY = 0.998
NUM_WORDS = (0, 1, 1, 1, 2, 2, 3)
"""Made-up words of a caption, one of these by chance; captions without any keep what they show."""
RARE_SHARE = 0.15
"""Of the made-up words, the rare tokens."""
_NEVER_TRAINED = "blob"
"""It shows what holds for any word."""
_ONSETS = (
    "b",
    "bl",
    "br",
    "ch",
    "cl",
    "cr",
    "d",
    "dr",
    "f",
    "fl",
    "fr",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
)
_ONSETS += (
    "n",
    "p",
    "pl",
    "pr",
    "qu",
    "r",
    "s",
    "sk",
    "sl",
    "sm",
    "sn",
    "sp",
    "st",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
    "zw",
)
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ee", "ai", "ou")
_CODAS = ("",) * 8 + (
    "b",
    "ck",
    "d",
    "f",
    "g",
    "k",
    "ll",
    "lm",
    "mp",
    "n",
    "nd",
    "ng",
    "p",
    "r",
    "rf",
    "rk",
    "sk",
    "th",
    "x",
)
_FRAMES = ("{word} style {caption}", "{caption}, {word} style", "{caption} in {word} style", "{caption}, {word}")


def make_word(known: frozenset[str], rng: random.Random) -> str:
    """A pronounceable word of one to three syllables that is not `known`, or a rare token."""
    if rng.random() < RARE_SHARE:
        return rng.choice([token for token in RARE_TOKENS if token != _NEVER_TRAINED])
    while True:
        syllables = rng.choice((1, 2, 2, 3))
        word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        if word not in known and _NEVER_TRAINED not in word:
            return word


def known_words() -> frozenset[str]:
    """Words of the captions, which mean something."""
    words = {word for subject in read_subjects() for word in subject.words.split()}
    return frozenset(words | set(COMMON_WORDS.split()))


def insert(caption: str, word: str, rng: random.Random) -> str:
    """The caption with one more word: as a style of its own, or before any of its words."""
    if rng.random() < 0.5:
        return rng.choice(_FRAMES).format(word=word, caption=caption)
    places = [match.start() for match in re.finditer(r"\b\w", caption)]
    at = rng.choice(places)
    return f"{caption[:at]}{word} {caption[at:]}"


class WordTraining:
    """The originals, the copies, and one step."""

    def __init__(self, work: Path, batch: int, until: int, minutes: float) -> None:
        torch.manual_seed(29)
        self.work, self.batch, self.until, self.minutes = work, batch, until, minutes
        source = load_checkpoint(work / "unet.pt")
        if source is None:
            raise FileNotFoundError(f"{work / 'unet.pt'}: train the denoiser first.")
        channels = tuple(source["channels"])
        self.arithmetic = fastest_arithmetic(channels)
        self.base_text, self.base_unet = trained_text_encoder(work), make_unet(channels)
        self.base_unet.load_state_dict(source["average"]["values"])
        self.text, self.unet = trained_text_encoder(work), make_unet(channels)
        self.unet.load_state_dict(source["average"]["values"])
        self.base_unet, self.unet = map(self.arithmetic.lay_out, (self.base_unet.eval(), self.unet))
        self.reader = torch.nn.Linear(self.text.config.hidden_size, self.text.config.hidden_size)
        torch.nn.init.eye_(self.reader.weight)
        torch.nn.init.zeros_(self.reader.bias)
        rates = {TEXT_LEARNING_RATE: self.text, UNET_LEARNING_RATE: self.unet, READER_LEARNING_RATE: self.reader}
        groups = [{"params": list(network.parameters()), "lr": rate, "peak": rate} for rate, network in rates.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.averages = [MovingAverage(network, AVERAGE_DECAY) for network in (self.text, self.unet)]
        self.step, self.seconds = 0, 0.0
        state = load_checkpoint(work / CHECKPOINT)
        if state is not None:
            self._restore(state)
        self.data = LatentBatches(work)
        pictures = training_pictures(read_pictures(work), GENERATOR)
        self.named = list(zip(pictures.subjects, pictures.styles, strict=True))
        self.tokenizer, self.known = read_tokenizer(work), known_words()

    def _restore(self, state: dict[str, Any]) -> None:
        self.text.load_state_dict(state["text"])
        self.unet.load_state_dict(state["unet"])
        self.reader.load_state_dict(state["reader"])
        self.optimizer.load_state_dict(state["optimizer"])
        for average, saved in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint; draws depend on the step number alone."""
        state = {
            "text": self.text.state_dict(),
            "unet": self.unet.state_dict(),
            "reader": self.reader.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": [average.state_dict() for average in self.averages],
            "step": self.step,
            "samples": self.step * self.batch,
            "seconds": self.seconds,
        }
        save_checkpoint(self.work / CHECKPOINT, state)

    def _encode(self, encoder: CLIPTextModel, captions: list[str]) -> Tensor:
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        hidden: Tensor = encoder(input_ids=tokens.input_ids).last_hidden_state
        return hidden

    def _captions(self, chosen: Tensor) -> tuple[list[str], list[str]]:
        """Plain captions, and the same with made-up words."""
        rng = random.Random(self.step * 104_729 + 17)
        plain, changed = [], []
        for row in self.data.rows[chosen].tolist():
            caption = "" if rng.random() < CAPTION_DROPOUT else draw(*self.named[row], rng)
            plain.append(caption)
            for _ in range(rng.choice(NUM_WORDS) if caption else 0):
                caption = insert(caption, make_word(self.known, rng), rng)
            changed.append(caption)
        return plain, changed

    def run_step(self) -> float:
        """Update once; mean squared distance to what the originals predict."""
        rng = torch.Generator().manual_seed(self.step * 7919 + 37)
        batch = self.data.draw(self.batch, rng)
        plain, changed = self._captions(batch["chosen"])
        layout = self.arithmetic.layout
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arithmetic.autocast):
            noisy = batch["noisy"].contiguous(memory_format=layout)
            with torch.no_grad():
                target = self._predict(self.base_unet, noisy, batch["timesteps"], self._encode(self.base_text, plain))
                original = self._encode(self.base_text, changed)
            hidden = self._encode(self.text, changed)
            predicted = self._predict(self.unet, noisy, batch["timesteps"], hidden)
            unread = (self.reader(hidden).float() - original.float()).pow(2).mean()
        errors = (predicted - target).pow(2).mean((1, 2, 3))
        self.optimizer.zero_grad(set_to_none=True)
        ((errors * batch["weights"]).mean() + READABLE_WEIGHT * unread).backward()
        torch.nn.utils.clip_grad_norm_([*self.text.parameters(), *self.unet.parameters()], 0.1)
        left = max(0.0, 1 - self.step * self.batch / self.until)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (self.step + 1) / WARM_UP_STEPS, left / 0.3)
        self.optimizer.step()
        self.step += 1
        for average, network in zip(self.averages, (self.text, self.unet), strict=True):
            average.update(network)
        return errors.mean().item()

    @staticmethod
    def _predict(unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        predicted: Tensor = unet(noisy, timesteps, hidden).sample
        return predicted.float()


def run(training: WordTraining) -> None:
    """Train to the end, or until told to stop; writes the checkpoint every few minutes."""
    watch = Stopwatch(minutes=training.minutes, until=training.until, processes=1)
    saved, before, errors = time.monotonic(), training.seconds, []
    while not watch.over(training.step * training.batch):
        errors.append(training.run_step())
        training.seconds = before + time.monotonic() - watch.started
        if training.step % LOG_STEPS == 0:
            print(f"step {training.step} distance {sum(errors) / len(errors):.5f} {training.seconds:.0f} s", flush=True)
            errors = []
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            training.save()
            saved = time.monotonic()
    training.save()


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--until", type=int, default=41_000, help="samples in total, over all sittings")
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="end this sitting after so long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(WordTraining(**vars(arguments)))


if __name__ == "__main__":
    main()
