"""Stage 3: two independent CLIPs, the generator's text tower and the scorer."""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.build_builtin.captions import PLAIN, STYLED, STYLED_SHARE, render
from scripts.build_builtin.networks import TEXT_WIDTH, clip_config, make_clip, make_text_encoder, read_tokenizer
from scripts.build_builtin.pictures import (
    Affine,
    Pictures,
    blur_some,
    cut_out,
    disturb_colours,
    read_pictures,
    to_unit,
    training_pictures,
)
from scripts.build_builtin.storage import load_checkpoint, save_checkpoint
from scripts.build_builtin.subjects import GENERATOR, SCORER
from scripts.build_builtin.tokenizer import CONTEXT_LENGTH

BATCH = 256
PEAK_LEARNING_RATE = 1.2e-3
CHECKPOINT_SECONDS = 120


@dataclass(frozen=True)
class Role:
    """What sets the two CLIPs apart: seed, towers and how pictures are disturbed."""

    seed: int
    image_width: int
    affine: Affine
    colour: float
    blur: float
    cutout: float


ROLES = {
    GENERATOR: Role(11, 20, Affine(10, (0.8, 1.05), 0.06, 0.0), 0.10, 0.2, 0.2),
    SCORER: Role(47, 24, Affine(18, (0.65, 1.1), 0.10, 0.3), 0.20, 0.4, 0.4),
}


class GeneratorClip(nn.Module):
    """Stable Diffusion's text encoder beside an image tower that is thrown away afterwards."""

    def __init__(self, role: Role, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text: CLIPTextModel = make_text_encoder(tokenizer)
        self.projection = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
        self.visual = make_clip(clip_config(role.image_width, TEXT_WIDTH, len(tokenizer))).visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """[n, dim] features, not normalised."""
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """[n, dim] features, not normalised, read at the first end-of-text token."""
        hidden = self.text(input_ids=tokens).last_hidden_state
        end = (tokens == self.text.config.eos_token_id).int().argmax(-1)
        return self.projection(hidden[torch.arange(len(tokens)), end])


def make_model(name: str, work: Path) -> GeneratorClip | CLIP:
    """Untrained model of the role."""
    role = ROLES[name]
    torch.manual_seed(role.seed)
    tokenizer = read_tokenizer(work)
    if name == GENERATOR:
        return GeneratorClip(role, tokenizer)
    return make_clip(clip_config(role.image_width, TEXT_WIDTH, len(tokenizer)))


def scorer_tokens(tokens: Tensor, pad_id: int) -> Tensor:
    """Tokens with padding 0, so that argmax finds the one end-of-text token (the highest id)."""
    first_end = (tokens == pad_id).int().argmax(-1, keepdim=True)
    return torch.where(torch.arange(tokens.shape[1])[None] > first_end, 0, tokens)


class Captioned:
    """Batches of disturbed pictures, caption tokens and the matrix of matching pairs."""

    def __init__(self, name: str, work: Path) -> None:
        self.role = ROLES[name]
        self.name = name
        self.tokenizer = read_tokenizer(work)
        self.pictures: Pictures = training_pictures(read_pictures(work), name)
        names = sorted({subject.name for subject in self.pictures.subjects})
        self.name_ids = torch.tensor([names.index(subject.name) for subject in self.pictures.subjects])
        self.style_ids = torch.tensor(
            [sorted(set(self.pictures.styles)).index(style) for style in self.pictures.styles]
        )

    def draw(self, rng: torch.Generator, words: random.Random) -> tuple[Tensor, Tensor, Tensor]:
        """Images [b, 3, 64, 64], tokens [b, context], matches [b, b] (rows are images)."""
        chosen = torch.randperm(len(self.pictures), generator=rng)[:BATCH]
        captions, styled = [], []
        for index in chosen.tolist():
            styled.append(words.random() < STYLED_SHARE)
            template = words.choice(STYLED if styled[-1] else PLAIN)
            captions.append(render(template, self.pictures.subjects[index], self.pictures.styles[index]))
        images = self.role.affine.apply(to_unit(self.pictures.pixels[chosen]), rng)
        images = disturb_colours(images, self.role.colour, rng)
        images = cut_out(blur_some(images, self.role.blur, rng), self.role.cutout, rng)
        # open_clip's text tower takes full length only; the other is spared the padding, which it never attends to
        tokens = self.tokenizer(
            captions,
            padding="max_length" if self.name == SCORER else "longest",
            max_length=CONTEXT_LENGTH,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        if self.name == SCORER:
            tokens = scorer_tokens(tokens, self.tokenizer.pad_token_id)
        names, styles = self.name_ids[chosen], self.style_ids[chosen]
        any_style = ~torch.tensor(styled)
        matches = (names[:, None] == names[None]) & ((styles[:, None] == styles[None]) | any_style[None])
        return images.contiguous(memory_format=torch.channels_last), tokens, matches


def contrastive_loss(images: Tensor, texts: Tensor, matches: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in both directions where a row may have several equally good partners."""
    logits = scale.exp().clamp(max=100) * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    target = matches.float()
    by_image = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, target.T / target.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), fused=True)


def learning_rate(progress: float, step: int) -> float:
    """Cosine over the time allowed after a short warm-up."""
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / 40) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


def train(name: str, work: Path, minutes: float) -> None:
    """Train until `minutes` of training time have been spent, over any number of starts."""
    model, data = make_model(name, work).to(memory_format=torch.channels_last), Captioned(name, work)  # type: ignore[call-overload]
    optimizer = make_optimizer(model)
    path = work / f"clip-{name}.pt"
    state = load_checkpoint(path) or {"step": 0, "seconds": 0.0}
    if "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    model.train()
    before, started, saved = state["seconds"], time.monotonic(), time.monotonic()
    step = state["step"]
    while (seconds := before + time.monotonic() - started) < minutes * 60:
        # one generator per step: a restart draws what an unbroken run would have drawn
        images, tokens, matches = data.draw(
            torch.Generator().manual_seed(ROLES[name].seed * 1_000_003 + step), random.Random(step)
        )
        loss = contrastive_loss(model.encode_image(images), model.encode_text(tokens), matches, model.logit_scale)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(seconds / (minutes * 60), step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"{name} step {step} seconds {seconds:.0f} loss {loss.item():.3f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(
                path,
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds},
            )
            saved = time.monotonic()
    save_checkpoint(
        path, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    )


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=sorted(ROLES))
    parser.add_argument("--work", type=Path, default=Path("build/builtin"))
    parser.add_argument("--minutes", type=float, default=13.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.role, arguments.work, arguments.minutes)


if __name__ == "__main__":
    main()
